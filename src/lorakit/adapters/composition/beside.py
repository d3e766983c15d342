"""Biases and modules trained beside: combined in their difference from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.composition.recipe import Part
from lorakit.adapters.targets import base_modules
from lorakit.errors import SpecError


def combined_biases(parts: Sequence[Part], base: nn.Module | None) -> dict[str, Tensor]:
    """Trained biases b0 + the sum of w (b - b0); see `_combine`."""
    return _combine(parts, base, lambda adapter: adapter.biases, ending=".bias")


def combined_overrides(parts: Sequence[Part], base: nn.Module | None) -> dict[str, Tensor]:
    """Parameters trained beside, p0 + the sum of w (p - p0); see `_combine`."""
    return _combine(parts, base, lambda adapter: adapter.overrides, ending="")


def fold_into_overrides(
    factors: Mapping[str, Factors], overrides: Mapping[str, Tensor]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Add low-rank changes to the weights that another part replaces whole.

    A layer is either adapted or replaced: in a file with both, one of them would be lost on load.
    p0 + the sum of w (p - p0) + the change B A is itself a replaced weight.

    Args:
        factors: of the result, none of them DoRA.
        overrides: of the result; not changed.

    Returns:
        The factors that stay factors, and the overrides with the others added.
    """
    kept: dict[str, Factors] = {}
    changed = dict(overrides)
    for site, update in factors.items():
        name = f"{update.module}.weight"
        if name not in changed:
            kept[site] = update
            continue
        value = changed[name]
        changed[name] = (value.double() + update.delta().double()).to(value.dtype)
    return kept, changed


def _combine(
    parts: Sequence[Part],
    base: nn.Module | None,
    values_of: Callable[[Adapter], Mapping[str, Tensor]],
    *,
    ending: str,
) -> dict[str, Tensor]:
    """Combine replaced parameters linearly, whatever the way is for low-rank updates.

    One part alone with weight 1 keeps its values bit for bit. Weights that sum to 1 over parts
    that all have the parameter need no base.

    Raises:
        SpecError: the base is needed and not given.
    """
    names = dict.fromkeys(name for part in parts for name in values_of(part.adapter))
    combined: dict[str, Tensor] = {}
    for name in names:
        having = [part for part in parts if name in values_of(part.adapter)]
        values = [values_of(part.adapter)[name] for part in having]
        if len(having) == 1 and having[0].weight == 1:
            combined[name] = values[0]
            continue
        total = sum(part.weight for part in having)
        result = torch.zeros_like(values[0], dtype=torch.float64)
        for part, value in zip(having, values, strict=True):
            result += part.weight * value.double()
        if abs(total - 1) > 1e-12:
            result += (1 - total) * _base_value(base, f"{name}{ending}", having).double()
        combined[name] = result.to(reduce(torch.promote_types, (v.dtype for v in values)))
    return combined


def _base_value(base: nn.Module | None, name: str, having: Sequence[Part]) -> Tensor:
    names = ", ".join(f"{part.name}={part.weight:g}" for part in having)
    if base is None:
        raise SpecError(
            "a parameter is trained beside; what an adapter changes of it depends on the base",
            where=name,
            found=names,
            remedy="give the base: compose(..., base=model), --base REF",
        )
    owner, _, leaf = name.rpartition(".")
    return base_modules(base)[owner].get_parameter(leaf).detach().cpu()
