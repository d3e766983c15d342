"""Models that torch.compile or DataParallel hold, parts of a model, and modules that hold one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from learned import assert_same_bits, attach_learned, bits, module_ids, shake
from lorakit.adapters.attach import active_adapter, attach, detach, use
from lorakit.adapters.fingerprint import fingerprint
from lorakit.adapters.fold import merge, unmerge
from lorakit.adapters.plan import plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import StateError
from lorakit.formats.peft import load_adapter, save_adapter

_SPEC = LoraSpec(r=3, alpha=7, targets="all-linear")
Wrap = Callable[[nn.Module], nn.Module]


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # pyright: ignore[reportReturnType]


@pytest.fixture(params=[_compiled, nn.DataParallel, lambda m: _compiled(nn.DataParallel(m))])
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return request.param


@torch.no_grad()
def test_use_of_a_wrapped_model_is_use_of_the_model(wrap: Wrap) -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    base = tiny_models.outputs(model, given)
    attach_learned(model, _SPEC, "one")
    learned = tiny_models.outputs(model, given)
    assert not torch.allclose(base, learned, atol=1e-2)
    wrapped = wrap(model)
    assert torch.allclose(wrapped(**given).logits, learned, atol=1e-5)
    with use(wrapped, None):
        assert active_adapter(wrapped) is None
        assert torch.allclose(wrapped(**given).logits, base, atol=1e-5)
    with use(wrapped, ["one", None, "one"]):
        rows = wrapped(**given).logits
    assert torch.allclose(rows[1], base[1], atol=1e-5)
    assert torch.allclose(rows[[0, 2]], learned[[0, 2]], atol=1e-5)
    assert active_adapter(wrapped) == "one"


@torch.no_grad()
def test_everything_else_of_a_wrapped_model_is_that_of_the_model(
    wrap: Wrap, tmp_path: Path
) -> None:
    model = tiny_models.build("llama")
    given = tiny_models.inputs(model)
    base, before, modules = wrap(model)(**given).logits, bits(model), module_ids(model)
    wrapped = wrap(model)
    assert plan_adapter(wrapped, _SPEC) == plan_adapter(model, _SPEC)
    assert fingerprint(wrapped) == fingerprint(model)
    attach(wrapped, _SPEC, "one")
    assert torch.allclose(wrapped(**given).logits, base, atol=1e-5)
    shake(model)
    learned = tiny_models.outputs(model, given)
    assert torch.allclose(wrapped(**given).logits, learned, atol=1e-5)
    save_adapter(wrapped, tmp_path / "one", "one")
    merge(wrapped, "one")
    assert torch.allclose(wrapped(**given).logits, learned, atol=1e-4)
    unmerge(wrapped)
    detach(wrapped)
    assert module_ids(model) == modules
    assert_same_bits(before, bits(model))
    load_adapter(wrapped, tmp_path / "one", "two")
    assert torch.allclose(tiny_models.outputs(model, given), learned, atol=1e-6)


def test_the_base_is_not_promised_where_the_adapter_would_run() -> None:
    model = tiny_models.build("llama")
    holder = nn.ModuleDict({"policy": model})
    with use(model.model, None), use(holder, None):
        pass
    attach(model, _SPEC)
    for other in (model.model, holder, model.model.layers[0].mlp.up_proj):
        with pytest.raises(StateError, match="were attached to another"), use(other, None):
            pytest.fail("never entered")
    detach(model)
    with use(holder, None):
        pass
