"""The laws of adapters hold over 4-bit weights as they do over dense ones: LoRA and DoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from learned import (
    assert_same_bits,
    attach_learned,
    bits,
    module_ids,
    trainable,
)
from lorakit.adapters.attach import attach, detach, use
from lorakit.adapters.attachments import adapted_layers
from lorakit.adapters.fingerprint import fingerprint
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning, StateError, TargetError
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.methods.lora import LoraMethod
from lorakit.models.empty import empty_model
from lorakit.models.load import load_base_model
from lorakit.models.nf4 import quantization_of
from lorakit.weights.nf4 import is_four_bit
from lorakit.weights.storage import base_weight, num_params

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-all-linear": ("llama", {"targets": "all-linear", "r": 5, "alpha": 3.0}),
    "llama-qv-rslora": ("llama", {"targets": "qv", "scaling": "alpha/sqrt(r)"}),
    "gpt2-parts": ("gpt2", {"targets": ("c_attn.q", "c_attn.v"), "r": 2}),
    "bert-bias": ("bert", {"targets": ("query", "value"), "bias": "lora_only"}),
    "phi3-all": ("phi3", {"targets": "all-linear"}),
    "t5-all": ("t5", {"targets": "all-linear"}),
    "falcon-all": ("falcon", {"targets": "all-linear", "r": 2}),
}
grid = pytest.mark.parametrize("case", list(CASES))
updates = pytest.mark.parametrize("update", ["lora", "dora"])


def spec_of(case: str, update: str = "lora", **changes: Any) -> LoraSpec:
    return LoraSpec(**{"r": 3, "alpha": 7.5, "update": update, **CASES[case][1], **changes})


@pytest.fixture
def load(tmp_path: Path):
    def loaded(case: str, quantize: str | None = "nf4", **options: Any):
        directory = tmp_path / case
        if not directory.exists():
            tiny_models.build(CASES[case][0]).save_pretrained(directory)
        return load_base_model(directory, quantize, device="cpu", **options)  # type: ignore[arg-type]

    return loaded


@grid
@updates
def test_attach_is_the_identity_and_counts_what_it_planned(load, case: str, update: str) -> None:
    model = load(case)
    assert quantization_of(model) is not None
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    values, places = bits(model), module_ids(model)
    spec = spec_of(case, update)
    plan = attach(model, spec)
    torch.testing.assert_close(tiny_models.outputs(model, given), before, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in trainable(model).values()) == plan.num_params()
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    detach(model)
    assert module_ids(model) == places
    assert_same_bits(values, bits(model))


@grid
@updates
def test_live_equals_merged_dense_and_unmerge_restores_every_bit(
    load, case: str, update: str
) -> None:
    model = load(case)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    attach_learned(model, spec_of(case, update))
    live = tiny_models.outputs(model, given)
    assert (live - before).abs().max() > 1e-3
    values, places = bits(model), module_ids(model)
    skipped = list(model.config.quantization_config.llm_int8_skip_modules)
    told = merge(model)
    assert told.survival == {}
    assert len(model.config.quantization_config.llm_int8_skip_modules) > len(skipped)
    merged = tiny_models.outputs(model, given)
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=2e-5)
    unmerge(model)
    assert_same_bits(values, bits(model))
    assert module_ids(model) == places
    assert model.config.quantization_config.llm_int8_skip_modules == skipped
    assert tiny_models.outputs(model, given).equal(live)
    with use(model, None):
        assert tiny_models.outputs(model, given).equal(before)


@pytest.mark.parametrize("case", ["llama-all-linear", "gpt2-parts"])
def test_a_merge_that_quantizes_again_says_what_survived(load, case: str) -> None:
    model = load(case)
    given = tiny_models.inputs(model)
    attach_learned(model, spec_of(case), size=0.3)
    live = tiny_models.outputs(model, given)
    values = bits(model)
    before = {
        layer.name: (base_weight(layer.base).read(), layer.delta("default"))
        for layer in adapted_layers(model)
    }
    told = merge(model, requantize=True)
    assert len(told.survival) == told.num_weights
    for layer in adapted_layers(model):
        assert is_four_bit(layer.base)
        (old, delta), found = before[layer.name], told.survival[layer.name]
        change = base_weight(layer.base).read() - old
        share = float((change * delta).sum() / delta.square().sum())
        assert found.share == pytest.approx(share, rel=1e-4)
        error = float((change - delta).norm() / delta.norm())
        assert found.relative_error == pytest.approx(error, rel=1e-4)
        assert 0.5 < share < 1.5
    error = (tiny_models.outputs(model, given) - live).abs().max()
    assert 0 < error < live.abs().max()
    unmerge(model)
    assert_same_bits(values, bits(model))


def test_a_change_below_the_step_of_4_bits_does_not_survive(load) -> None:
    model = load("llama-all-linear")
    attach_learned(model, spec_of("llama-all-linear"), size=1e-4)
    told = merge(model, requantize=True)
    assert all(part.share < 0.2 for part in told.survival.values())


def test_quantizing_a_dense_base_again_is_refused() -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec())
    with pytest.raises(StateError, match="nothing to quantize again"):
        merge(model, requantize=True)


@grid
def test_the_base_keeps_the_fingerprint_of_its_dense_weights(load, case: str) -> None:
    dense = fingerprint(load(case, None))
    assert fingerprint(load(case)).difference(dense) is None
    assert fingerprint(load(case, dtype="bfloat16")).sha256 == dense.sha256


def test_an_adapter_goes_from_4_bits_to_dense_and_back_with_a_note(load, tmp_path: Path) -> None:
    model, dense = load("gpt2-parts"), load("gpt2-parts", None)
    given = tiny_models.inputs(model)
    attach_learned(model, spec_of("gpt2-parts"))
    live = tiny_models.outputs(model, given)
    save_adapter(model, tmp_path / "adapter")
    again = load("gpt2-parts")
    load_adapter(again, tmp_path / "adapter")
    assert tiny_models.outputs(again, given).equal(live)
    with pytest.warns(LorakitWarning, match="trained beside nf4 weights"):
        load_adapter(dense, tmp_path / "adapter")
    difference = (tiny_models.outputs(dense, given) - live).abs().max()
    assert 0 < difference < 0.3 * live.abs().max()


def test_4_bit_numbers_count_by_their_original_shape(load) -> None:
    model, dense = load("gpt2-parts"), load("gpt2-parts", None)
    assert num_params(model) == sum(p.numel() for p in dense.parameters())
    spec = spec_of("gpt2-parts")
    empty = empty_model(dense.config.name_or_path)
    report = LoraMethod(spec).plan(model)
    assert report == LoraMethod(spec).plan(empty)
    assert plan_adapter(model, spec).num_params() == plan_adapter(empty, spec).num_params()


def test_a_4_bit_module_cannot_be_trained_as_a_whole(load) -> None:
    with pytest.raises(TargetError, match="4-bit"):
        plan_adapter(load("llama-all-linear"), LoraSpec(also_train=("layers.0.mlp",)))


def test_head_embeddings_and_norms_stay_dense(load) -> None:
    model = load("llama-all-linear")
    names = {n for n, m in model.named_modules() if is_four_bit(m)}
    assert names == {
        n for n, m in load("llama-all-linear", None).named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }  # fmt: skip
