from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import tiny_models
from lorakit.serve.fitness import fitness_of
from lorakit.serve.packed import _Scores


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text"])
def test_fit_for_continuous_batches(name: str) -> None:
    model = tiny_models.build(name)
    attention = model.config._attn_implementation
    assert fitness_of(model).static_reason is None
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("name", "word"), [("bloom", "own"), ("falcon", "own"), ("t5", "encoder-decoder")]
)
def test_static_for_a_reason(name: str, word: str) -> None:
    found = fitness_of(tiny_models.build(name))
    assert found.static_reason is not None
    assert word in found.static_reason
    assert not found.alone


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
