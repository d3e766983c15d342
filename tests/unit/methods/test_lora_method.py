from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_models
from law_cases import Case, grid
from learned import assert_same_bits, bits, shake, trainable
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import ConfigError, LorakitError, SpecError
from lorakit.formats.peft import load_adapter
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import METHODS, build_method


def test_unknown_methods_and_options_are_refused() -> None:
    assert "lora" in METHODS
    with pytest.raises(ConfigError, match="lora"):
        build_method("loar", {})
    with pytest.raises(SpecError, match="dropout"):
        build_method("lora", {"dropuot": 0.1})


@grid("llama-qv", "gpt2-parts-ranks", "bert-bias-lora-only", "vit-everything")
def test_state_goes_out_and_comes_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    method = build_method("lora", case.make().to_dict())
    before = tiny_models.outputs(model, given)
    report = method.attach(model)
    assert tiny_models.outputs(model, given).equal(before)
    assert report.num_trainable == sum(p.numel() for p in trainable(model).values())
    assert report.num_total == sum(p.numel() for p in model.parameters())
    assert 0 < report.share < 1
    shake(model)
    live = tiny_models.outputs(model, given)
    state = method.state(model)
    assert sum(t.numel() for t in state.values()) == report.num_trainable
    # Live tensors, not copies.
    pointers = {p.data_ptr() for p in trainable(model).values()}
    assert {t.data_ptr() for t in state.values()} == pointers
    kept = {n: t.detach().clone() for n, t in state.items()}
    shake(model, seed=99)
    assert not tiny_models.outputs(model, given).equal(live)
    method.load(model, kept)
    assert {t.data_ptr() for t in method.state(model).values()} == pointers
    assert tiny_models.outputs(model, given).equal(live)
    method.save(model, tmp_path / "out", {"seed": 5})
    method.save(model, tmp_path / "out", {"seed": 6})
    assert json.loads((tmp_path / "out" / "lorakit.json").read_text())["seed"] == 6
    fresh = tiny_models.build(case.architecture)
    load_adapter(fresh, tmp_path / "out")
    torch.testing.assert_close(tiny_models.outputs(fresh, given), live, rtol=1e-6, atol=1e-6)


def test_loading_a_state_is_strict_and_whole() -> None:
    model = tiny_models.build("llama")
    method = build_method("lora", {"r": 3, "alpha": 5})
    method.attach(model)
    shake(model)
    good = {n: t.detach().clone() + 1 for n, t in method.state(model).items()}
    first = next(iter(good))
    values = bits(model)
    for wrong in (
        {n: t for n, t in good.items() if n != first},
        {**good, "extra": torch.ones(2)},
        {**good, list(good)[-1]: torch.ones(2, 2)},
        {},
    ):
        with pytest.raises(LorakitError):
            method.load(model, wrong)
        assert_same_bits(values, bits(model))


def test_lora_plus_learns_b_and_vectors_faster_and_embeddings_at_a_fixed_rate() -> None:
    model = tiny_models.build("gpt2")
    spec = LoraSpec(targets=("c_attn", "wpe"), bias="lora_only", also_train=("mlp.c_fc",))
    method = LoraMethod(spec, lora_plus_ratio=16)
    method.attach(model)
    names = {id(p): name for name, p in method.state(model).items()}
    groups = {g["lr"]: {names[id(p)] for p in g["params"]} for g in method.param_groups(model, 0.5)}
    assert list(groups) == [0.5, 8.0, 1e-6]
    slow, fast, fixed = groups.values()
    assert {name.rpartition(".")[2].strip("@") for name in slow} == {"lora_A", "weight"}
    assert {name.rpartition(".")[2].strip("@") for name in fast} == {"lora_B", "bias"}
    assert len(fixed) == 2
    assert all("wpe" in name for name in fixed)
    assert slow | fast | fixed == set(names.values())


@grid("llama-qv", "gpt2-parts-ranks", "bert-bias-lora-only")
def test_planned_disabled_and_merged(case: Case) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    base = tiny_models.outputs(model, given)
    method = build_method("lora", case.make().to_dict())
    again = build_method(method.name, json.loads(json.dumps(method.options())))
    planned = again.plan(model)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert method.attach(model) == planned
    shake(model)
    live = tiny_models.outputs(model, given)
    assert not live.equal(base)
    with method.disabled(model):
        assert tiny_models.outputs(model, given).equal(base)
    assert tiny_models.outputs(model, given).equal(live)
    groups = method.param_groups(model, 1e-3)
    learned = {id(p) for p in trainable(model).values()}
    assert {id(p) for group in groups for p in group["params"]} == learned
    assert [group["lr"] for group in groups] == [1e-3]
    method.merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=1e-5)
