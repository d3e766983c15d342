"""What may stand on one model together: every ordered pair of the registry."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

import tiny_models
from learned import assert_same_bits, bits
from lorakit.adapters.attach import attach, detach
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import StateError
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import METHODS, build_method

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "prefix_embedding": {"prefix": 2, "infix": 0},
    "prefix_layer": {"prefix": 2},
    **{name: {"bottleneck": 3} for name in ("houlsby", "lin", "pfeiffer")},
    "adapterdrop": {"bottleneck": 3, "drop_first": 1},
}
FOLD = ("full", "last_layers", "bitfit")


@pytest.mark.parametrize(("first", "second"), list(itertools.product(METHODS, METHODS)))
def test_only_lora_stands_beside_lora(first: str, second: str) -> None:
    model = tiny_models.build("gpt2")
    there = build_method(first, OPTIONS.get(first, {}))
    there.attach(model)
    before, modules = bits(model), [id(module) for module in model.modules()]
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    if (first, second) == ("lora", "lora"):
        LoraMethod(LoraSpec(r=2), "another").plan(model)
        LoraMethod(LoraSpec(r=2), "another").attach(model)
        return
    newcomer = build_method(second, OPTIONS.get(second, {}))
    for step in (newcomer.plan, newcomer.attach):
        with pytest.raises(StateError) as caught:
            step(model)
        error = caught.value
        assert f"{second} cannot be attached beside" in error.what
        assert first.replace("lora", "LoRA") in error.what
        assert error.found
        assert error.remedy
    assert_same_bits(before, bits(model))
    assert [id(module) for module in model.modules()] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    assert all(value.requires_grad for value in there.state(model).values())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lora"}))
def test_attach_refuses_a_spec_and_a_plan_on_another_methods_model(method: str) -> None:
    model = tiny_models.build("gpt2")
    plan = plan_adapter(model, LoraSpec(r=2))
    build_method(method, OPTIONS.get(method, {})).attach(model)
    for request in (LoraSpec(r=2), plan):
        with pytest.raises(StateError, match=f"beside {method}"):
            attach(model, request)
    with pytest.raises(StateError, match=f"beside {method}"):
        plan_adapter(copy.deepcopy(model), LoraSpec(r=2))


@pytest.mark.parametrize("method", FOLD)
def test_what_was_folded_in_is_a_base_like_any_other(method: str) -> None:
    model = tiny_models.build("gpt2")
    learned = build_method(method, {})
    learned.attach(model)
    with pytest.raises(StateError, match="fold it in"):
        plan_adapter(model, LoraSpec(r=2))
    learned.merge(model)
    attach(model, LoraSpec(r=2))
    detach(model)
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    build_method("houlsby", {"bottleneck": 3}).attach(model)
    assert torch.equal(tiny_models.outputs(model, given), before)
