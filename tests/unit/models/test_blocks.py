from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import tiny_models
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import TargetError
from lorakit.models.blocks import transformer_blocks

ENCODERS = {"bert", "roberta", "deberta-v2"}
PARALLEL = {"falcon", "falcon-grouped", "gpt_neox"}
UNKNOWN = {"t5", "vit"}
KNOWN = sorted(set(tiny_models.BUILDERS) - UNKNOWN)


def opt_350m() -> PreTrainedModel:
    """OPT-350M's layout: the norms come after the residual."""
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        do_layer_norm_before=False,
    )
    return OPTForCausalLM(config).eval()


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    return Gemma2ForCausalLM(config).eval()


def build(name: str) -> PreTrainedModel:
    others = {"opt-350m": opt_350m, "gemma2": gemma2}
    return others[name]() if name in others else tiny_models.build(name)


ALL = [*KNOWN, "opt-350m", "gemma2"]


@contextmanager
def outputs_replaced(model: nn.Module, names: list[str], value: float) -> Iterator[list[int]]:
    """Every named module's output becomes one number; yields how often each was called."""
    calls = [0] * len(names)

    def replace(i: int):
        def hook(_module, _args, output):
            calls[i] += 1
            return torch.full_like(output, value)

        return hook

    handles = [
        model.get_submodule(n).register_forward_hook(replace(i)) for i, n in enumerate(names)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run_recorded(model: PreTrainedModel, block: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's input and output in one run of the model."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        tiny_models.outputs(model, tiny_models.inputs(model))
    finally:
        handle.remove()
    (pair,) = seen
    return pair


@pytest.mark.parametrize("name", ALL)
def test_a_block_is_its_residual_when_both_outputs_are_zero(name):
    model = build(name)
    blocks = transformer_blocks(model)
    assert len(blocks) == 2
    block = blocks[1]
    with outputs_replaced(model, [block.attention_output, block.mlp_output], 0.0) as calls:
        x, y = run_recorded(model, block.module)
    assert calls == [1, 1]
    if block.output_norm is None:
        assert torch.equal(x, y)
        return
    # Post-norm: the two norms remain, and the last of them is the one that is named.
    first, last = (model.get_submodule(n) for n in block.norms)
    assert last is model.get_submodule(block.output_norm)
    torch.testing.assert_close(y, last(first(x)))


@pytest.mark.parametrize("name", ALL)
def test_each_output_is_added_to_the_residual(name):
    model = build(name)
    block = transformer_blocks(model)[0]
    with outputs_replaced(model, [block.attention_output, block.mlp_output], 0.5):
        x, y = run_recorded(model, block.module)
    if block.output_norm is None:
        torch.testing.assert_close(y, x + 1.0)
    else:
        first, last = (model.get_submodule(n) for n in block.norms)
        torch.testing.assert_close(y, last(first(x + 0.5) + 0.5))


@pytest.mark.parametrize("name", ALL)
def test_what_a_block_says_of_itself(name):
    model = build(name)
    prefixes = []
    for block in transformer_blocks(model):
        assert model.get_submodule(block.name) is block.module
        assert block.width == 32
        assert block.kind == ("encoder" if name in ENCODERS else "decoder")
        assert block.parallel == (name in PARALLEL)
        assert (block.output_norm is not None) == (name in ENCODERS | {"opt-350m"})
        assert all(n.startswith(block.name + ".") for n in block.norms)
        assert not any(n.endswith(("q_norm", "k_norm")) for n in block.norms)
        expected = 4 if name in {"gemma3_text", "gemma2"} else 1 if name == "falcon" else 2
        assert len(block.norms) == expected
        prefixes.append(block.name.rpartition("."))
    assert [last for _, _, last in prefixes] == ["0", "1"]
    assert len({first for first, _, _ in prefixes}) == 1


@pytest.mark.parametrize("name", KNOWN)
def test_the_meta_device_gives_the_same_blocks(name):
    real = tiny_models.build(name)
    with torch.device("meta"):
        empty = type(real)(real.config)
    told = [
        (b.name, b.attention_output, b.mlp_output, b.width, b.norms)
        for b in transformer_blocks(empty)
    ]
    assert told == [
        (b.name, b.attention_output, b.mlp_output, b.width, b.norms)
        for b in transformer_blocks(real)
    ]


def test_the_body_without_a_head_has_shorter_names():
    model = tiny_models.build("llama").base_model
    assert [b.name for b in transformer_blocks(model)] == ["layers.0", "layers.1"]


def test_attached_adapters_do_not_hide_the_blocks():
    model = tiny_models.build("llama")
    before = transformer_blocks(model)
    attach(model, LoraSpec(r=2, targets="all-linear"))
    assert transformer_blocks(model) == before


@pytest.mark.parametrize(
    ("name", "reason"), [("vit", "not known"), ("t5", "two stacks and a cross-attention")]
)
def test_unknown_architectures_are_refused_with_the_reason(name, reason):
    with pytest.raises(TargetError, match=reason):
        transformer_blocks(tiny_models.build(name))


def test_a_mixture_of_experts_is_refused_and_named():
    with torch.device("meta"):
        model = MixtralForCausalLM(
            MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
        )
    with pytest.raises(TargetError, match="not known") as caught:
        transformer_blocks(model)
    assert "MixtralDecoderLayer" in str(caught.value)


def test_cross_attention_is_refused():
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(TargetError, match="cross-attention"):
        transformer_blocks(BertLMHeadModel(config))


def test_a_causal_bert_is_a_decoder():
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=True,
    )
    assert transformer_blocks(BertLMHeadModel(config))[0].kind == "decoder"


def test_a_projection_that_is_never_called_is_refused():
    config = BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True
    )
    with pytest.raises(TargetError, match="in slices"):
        transformer_blocks(BloomForCausalLM(config))


def test_a_block_that_lacks_an_output_is_refused():
    model = AutoModel.from_config(tiny_models.build("bert").config)
    del model.encoder.layer[1].output.dense
    with pytest.raises(TargetError, match="no MLP output") as caught:
        transformer_blocks(model)
    assert "encoder.layer.1" in str(caught.value)
