"""The grouped attention gives what eager attention gives."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModel

from lorakit.errors import ModelError
from lorakit.models.attention import GROUPED, use_attention

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 40,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "gemma2 (soft-capped)": Gemma2Config(**GQA, attn_logit_softcapping=0.5, sliding_window=3),
    "gemma3 (sliding)": Gemma3TextConfig(**GQA, sliding_window=3),
    "gpt2": GPT2Config(n_embd=24, n_layer=2, n_head=6, vocab_size=40),
    "bert": BertConfig(**SMALL),
}


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_and_gradients_are_those_of_eager_attention(name, side):
    model = model_of(CONFIGS[name])
    ids = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask = mask if side == "right" else mask.flip(1)
    found = []
    for kernel in ("eager", GROUPED):
        use_attention(model, kernel)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        model.zero_grad()
        states.sin().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([states.detach(), *grads])
    assert model.config._attn_implementation == GROUPED
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_generating_with_a_cache_gives_the_same_tokens():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    written = []
    for kernel in ("eager", GROUPED):
        use_attention(model, kernel)
        written.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(written[0], written[1])


def test_dropout_is_applied_in_training():
    model = model_of(LlamaConfig(**GQA, attention_dropout=0.5))
    use_attention(model, GROUPED)
    ids = torch.arange(1, 9)[None]
    still = [model(ids).last_hidden_state for _ in range(2)]
    model.train()
    moving = [model(ids).last_hidden_state for _ in range(2)]
    torch.testing.assert_close(still[0], still[1])
    assert (moving[0] - moving[1]).abs().max() > 1e-4


def test_sinks_are_refused_by_name():
    config = GptOssConfig(**GQA, num_local_experts=2, num_experts_per_tok=1)
    model = model_of(config)
    use_attention(model, GROUPED)
    with pytest.raises(ModelError, match="sinks"):
        model(torch.arange(1, 6)[None])


def test_a_masked_row_is_finite_under_autocast():
    model = model_of(LlamaConfig(**GQA))
    use_attention(model, GROUPED)
    ids = torch.arange(1, 9)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding: its first queries see no key at all
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, attention_mask=mask).last_hidden_state.isfinite().all()


def test_a_model_that_keeps_its_own_attention_says_so():
    config = BloomConfig(hidden_size=24, n_layer=1, n_head=2, vocab_size=40)
    with pytest.raises(ModelError, match="cannot run with attention grouped"):
        use_attention(AutoModel.from_config(config), GROUPED)


def test_a_kernel_that_is_not_there_is_a_clear_error():
    with pytest.raises(ModelError, match="attention no_such_kernel"):
        use_attention(model_of(CONFIGS["llama"]), "no_such_kernel")
