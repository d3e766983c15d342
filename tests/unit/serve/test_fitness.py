from __future__ import annotations

import pytest
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import tiny_models
from lorakit.serve.fitness import Fitness, fitness_of
from lorakit.serve.packed import _Scores
from serving import ask, assert_same, prompts, running

BART = {
    "vocab_size": 128,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text"])
def test_fit_for_continuous_batches(name: str) -> None:
    model = tiny_models.build(name)
    attention = model.config._attn_implementation
    assert fitness_of(model).static_reason is None
    assert model.config._attn_implementation == attention


def test_a_mixture_of_experts_is_fit_for_continuous_batches() -> None:
    """Its layers are told whether to return the router's logits: nothing to attention."""
    assert fitness_of(tiny_models.seeded(tiny_models.qwen3_moe, seed=5)) == Fitness(None)


@pytest.mark.parametrize(
    ("name", "word"), [("bloom", "own"), ("falcon", "own"), ("t5", "encoder-decoder")]
)
def test_static_for_a_reason(name: str, word: str) -> None:
    found = fitness_of(tiny_models.build(name))
    assert found.static_reason is not None
    assert word in found.static_reason
    assert not found.alone


def test_a_decoder_whose_positions_count_padding_runs_alone() -> None:
    """BART's decoder by itself counts from the left edge of the batch, whatever the mask says."""
    model = tiny_models.seeded(lambda: BartForCausalLM(BartConfig(**BART)), seed=1).eval()
    found = fitness_of(model)
    assert found.alone
    assert "padding changes its answers" in str(found.static_reason)
    given = prompts([9, 3, 14])
    with running(model) as engine:
        alone = [ask(engine, p, max_tokens=5, logprobs=0, ignore_eos=True).wait() for p in given]
        both = [ask(engine, p, max_tokens=5, logprobs=0, ignore_eos=True) for p in given]
        for one, other in zip(alone, both, strict=True):
            assert_same(one, other.wait())


def test_state_space_models_are_static() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    assert fitness_of(model).static_reason is not None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_run_alone(kind: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    found = fitness_of(model)
    assert found.alone
    assert found.static_reason is not None


def test_attention_that_computes_something_else_is_found_out(monkeypatch) -> None:
    """A model that declares itself fit, and is not: its logits say so."""
    model = tiny_models.build("llama")
    original = _Scores.attend_rows
    monkeypatch.setattr(
        _Scores, "attend_rows", lambda self, q, k, v, mask: original(self, q, k, v, 0 * mask + 0.0)
    )
    monkeypatch.setattr(
        "lorakit.serve.packed.window_mask",
        lambda queries, n, window, dtype: (queries[..., None] * 0.0).expand(*queries.shape, n),
    )
    reason = fitness_of(model).static_reason
    assert reason is not None
    assert "other logits" in reason
