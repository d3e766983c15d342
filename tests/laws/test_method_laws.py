"""What every method promises; a new method adds its cases to METHOD_CASES."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from learned import assert_same_bits, bits, shake, trainable
from lorakit.errors import AdapterFileError, BaseMismatchError, MergeError
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method
from lorakit.methods.saved import load_saved


@dataclass(frozen=True)
class MethodCase:
    """One method on one architecture.

    Attributes:
        identity: attach changes no output; False where the method's definition changes it.
        merges: what was learned has a form in the base's own weights.
    """

    name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    merges: bool = True

    def make(self) -> Method:
        return build_method(self.name, self.options)


METHOD_CASES = {
    "lora-llama": MethodCase("lora", "llama", {"r": 3, "alpha": 7.5, "targets": "all-linear"}),
    "lora-gpt2": MethodCase("lora", "gpt2", {"r": 3, "alpha": 7.5, "also_train": ["ln_f"]}),
    "full-llama-tied": MethodCase("full", "llama-tied", {"keep_base": True}),
    "full-gpt2": MethodCase("full", "gpt2", {"keep_base": True}),
    "full-bert": MethodCase("full", "bert", {"keep_base": True}),
    "last-gpt2": MethodCase("last_layers", "gpt2", {"num_layers": 1}),
    "last-llama-head": MethodCase("last_layers", "llama", {"num_layers": 1, "head": "also"}),
    "head-llama": MethodCase("last_layers", "llama", {"head": "only"}),
    "last-bert": MethodCase(
        "last_layers", "bert", {"num_layers": 1, "also_train": ["pooler.dense"]}
    ),
    "bitfit-gpt2": MethodCase("bitfit", "gpt2"),
    "bitfit-opt": MethodCase("bitfit", "opt", {"also_train": ["final_layer_norm"]}),
    "bitfit-bert": MethodCase("bitfit", "bert"),
    "bitfit-added-llama": MethodCase("bitfit", "llama", {"add": True}, merges=False),
    "bitfit-added-qwen2": MethodCase("bitfit", "qwen2", {"add": True}, merges=False),
    **{
        f"{method}-{architecture}": MethodCase(
            method,
            architecture,
            {"prefix": 3, "infix": infix, **beside},
            identity=False,
            merges=False,
        )
        for method in ("prefix_embedding", "prefix_layer")
        for architecture, infix, beside in (
            ("llama", 2, {}),
            ("gemma3_text", 0, {"init": "normal"}),
            ("gpt2", 2, {"also_train": ["ln_f"]}),
            ("bert", 1, {"also_train": ["pooler.dense"]}),
        )
    },
    "houlsby-gpt2": MethodCase("houlsby", "gpt2", {"bottleneck": 3}, merges=False),
    "houlsby-gemma3": MethodCase(
        "houlsby", "gemma3_text", {"bottleneck": 3, "train_layer_norms": True}, merges=False
    ),
    "houlsby-falcon": MethodCase("houlsby", "falcon", {"bottleneck": 5}, merges=False),
    "houlsby-bert": MethodCase(
        "houlsby", "bert", {"bottleneck": 3, "also_train": ["pooler.dense"]}, merges=False
    ),
    "lin-llama": MethodCase("lin", "llama", {"bottleneck": 3, "blocks": [1]}, merges=False),
    "lin-falcon": MethodCase("lin", "falcon-grouped", {"bottleneck": 3}, merges=False),
    "lin-deberta": MethodCase("lin", "deberta-v2", {"bottleneck": 5}, merges=False),
    "pfeiffer-roberta": MethodCase(
        "pfeiffer", "roberta", {"bottleneck": 3, "train_layer_norms": True}, merges=False
    ),
    "pfeiffer-opt": MethodCase("pfeiffer", "opt", {"bottleneck": 3}, merges=False),
    "adapterdrop-bert": MethodCase(
        "adapterdrop", "bert", {"bottleneck": 3, "drop_first": 1}, merges=False
    ),
    "adapterdrop-random-llama": MethodCase(
        "adapterdrop",
        "llama",
        {"bottleneck": 3, "drop_first": 1, "at_random": True, "placement": "houlsby"},
        merges=False,
    ),
}

each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in METHOD_CASES.items()]
)


@each_case
def test_plan_is_pure_works_on_meta_and_is_what_attach_reports(case: MethodCase) -> None:
    model = tiny_models.build(case.architecture)
    before, modules = bits(model), [id(module) for module in model.modules()]
    planned = case.make().plan(model)
    assert_same_bits(before, bits(model))
    assert [id(module) for module in model.modules()] == modules
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.tie_weights()
    on_meta = case.make().plan(empty)
    assert (on_meta.num_trainable, on_meta.sites) == (planned.num_trainable, planned.sites)
    assert case.make().attach(model) == planned
    learned = trainable(model).values()
    assert planned.num_trainable == sum(p.numel() for p in learned) > 0
    assert planned.num_total == sum(p.numel() for p in model.parameters())


@each_case
def test_attach_is_the_identity_and_disabled_is_the_base(case: MethodCase) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    base = tiny_models.outputs(model, given)
    method = case.make()
    method.attach(model)
    if case.identity:
        torch.testing.assert_close(tiny_models.outputs(model, given), base, rtol=0, atol=1e-6)
    shake(model)
    live, learned = tiny_models.outputs(model, given), bits(model)
    assert not torch.allclose(live, base, atol=1e-3)
    with method.disabled(model):
        assert tiny_models.outputs(model, given).equal(base)
    with pytest.raises(ZeroDivisionError), method.disabled(model):
        raise ZeroDivisionError
    assert tiny_models.outputs(model, given).equal(live)
    assert_same_bits(learned, bits(model))


@each_case
def test_state_is_live_and_load_is_its_inverse(case: MethodCase) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    method = case.make()
    method.attach(model)
    shake(model)
    live, state = tiny_models.outputs(model, given), method.state(model)
    pointers = {p.data_ptr() for p in trainable(model).values()}
    assert {t.data_ptr() for t in state.values()} == pointers
    kept = {name: t.detach().clone() for name, t in state.items()}
    shake(model, seed=99)
    assert not tiny_models.outputs(model, given).equal(live)
    method.load(model, kept)
    assert {t.data_ptr() for t in method.state(model).values()} == pointers
    assert tiny_models.outputs(model, given).equal(live)
    values, first = bits(model), next(iter(kept))
    for wrong in (
        {n: t + 1 for n, t in kept.items() if n != first},
        {**{n: t + 1 for n, t in kept.items()}, "another": torch.ones(2)},
        {**{n: t + 1 for n, t in kept.items()}, first: torch.ones(1, 1, 7)},
        {**{n: t + 1 for n, t in kept.items()}, first: torch.full_like(kept[first], torch.nan)},
    ):
        with pytest.raises(AdapterFileError):
            method.load(model, wrong)
        assert_same_bits(values, bits(model))


@each_case
def test_the_groups_hold_every_learned_tensor_once(case: MethodCase) -> None:
    model = tiny_models.build(case.architecture)
    method = case.make()
    method.attach(model)
    grouped = [id(p) for group in method.param_groups(model, 0.25) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainable(model).values())
    assert all(group["lr"] > 0 for group in method.param_groups(model, 0.25))


@each_case
def test_saved_is_loaded_and_another_base_is_refused(case: MethodCase, tmp_path: Path) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    base = tiny_models.outputs(model, given)
    method = build_method(case.name, json.loads(json.dumps(case.make().options())))
    method.attach(model)
    shake(model)
    live = tiny_models.outputs(model, given)
    method.save(model, tmp_path / "out", {"seed": 5})
    method.save(model, tmp_path / "out", {"seed": 6})
    passport = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert (passport["seed"], passport["method"]) == (6, case.name)
    fresh = tiny_models.build(case.architecture)
    loaded = load_saved(fresh, tmp_path / "out")
    assert loaded.name == case.name
    torch.testing.assert_close(tiny_models.outputs(fresh, given), live, rtol=1e-6, atol=1e-6)
    with loaded.disabled(fresh):
        assert tiny_models.outputs(fresh, given).equal(base)
    other = tiny_models.build(case.architecture)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.125)
    before = bits(other)
    with pytest.raises(BaseMismatchError):
        load_saved(other, tmp_path / "out")
    assert_same_bits(before, bits(other))
    load_saved(other, tmp_path / "out", any_base=True)


@each_case
def test_merged_is_live_in_the_base_class_or_refused_with_the_reason(case: MethodCase) -> None:
    model = tiny_models.build(case.architecture)
    given = tiny_models.inputs(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = [name for name, _ in model.named_parameters()]
    method = case.make()
    method.attach(model)
    shake(model)
    live = tiny_models.outputs(model, given)
    if not case.merges:
        with pytest.raises(MergeError) as caught:
            method.merge(model)
        assert caught.value.remedy
        assert tiny_models.outputs(model, given).equal(live)
        return
    method.merge(model)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert [name for name, _ in model.named_parameters()] == parameters
    torch.testing.assert_close(tiny_models.outputs(model, given), live, rtol=1e-5, atol=1e-5)
