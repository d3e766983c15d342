"""What tests of adapters share: an adapter that has learned something, and every tensor's bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.attach import attach
from lorakit.adapters.plan import AdapterPlan
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitWarning


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def shake(model: nn.Module, *, seed: int = 7, size: float = 0.2) -> None:
    """Move everything that is trainable now: attach leaves exactly the new adapter trainable."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        with torch.no_grad():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def attach_learned(
    model: nn.Module,
    spec: LoraSpec,
    name: str = "default",
    *,
    seed: int = 7,
    size: float = 0.2,
    warns: str | None = None,
) -> AdapterPlan:
    """Attach an adapter and pretend it was trained: B is no longer zero."""
    with expected_warning(warns):
        plan = attach(model, spec, name=name)
    shake(model, seed=seed, size=size)
    return plan


def expected_warning(match: str | None) -> AbstractContextManager[object]:
    return nullcontext() if match is None else pytest.warns(LorakitWarning, match=match)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {n: t.detach().clone() for n, t in every_tensor(model)}


def every_tensor(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    changed = [n for n, t in before.items() if t.dtype != after[n].dtype or not t.equal(after[n])]
    assert changed == []


def module_ids(model: nn.Module) -> dict[str, int]:
    """Every place in the tree, shared modules at each of their places -> the module's identity."""
    return {n: id(m) for n, m in model.named_modules(remove_duplicate=False)}
