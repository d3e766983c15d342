"""Biases and modules trained beside: combined in their difference from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.composition.recipe import Part
from lorakit.adapters.parameters import matrix_of, parameter_of
from lorakit.adapters.targets import base_modules
from lorakit.errors import BaseMismatchError, SpecError


def combined_biases(parts: Sequence[Part], base: nn.Module | None) -> dict[str, Tensor]:
    """Trained biases b0 + the sum of w (b - b0); see `_combine`."""
    return _combine(parts, base, _biases, ending=".bias")


def combined_overrides(parts: Sequence[Part], base: nn.Module | None) -> dict[str, Tensor]:
    """Parameters trained beside, p0 + the sum of w (p - p0); see `_combine`."""
    return _combine(parts, base, _overrides, ending="")


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
        name = f"{update.module}.weight" if update.stack is None else parameter_of(update)
        if name not in changed:
            kept[site] = update
            continue
        value = changed[name].double()
        matrix = value if update.stack is None else matrix_of(value, update)
        matrix += update.delta().double()
        changed[name] = value.to(changed[name].dtype)
    return kept, changed


def beside_needs_base(parts: Sequence[Part]) -> bool:
    """Whether a bias or a parameter trained beside cannot be combined without the base's own."""
    return any(
        not _is_settled(having)
        for values_of in (_biases, _overrides)
        for having in _holders(parts, values_of).values()
    )


def _biases(adapter: Adapter) -> Mapping[str, Tensor]:
    return adapter.biases


def _overrides(adapter: Adapter) -> Mapping[str, Tensor]:
    return adapter.overrides


def _holders(
    parts: Sequence[Part], values_of: Callable[[Adapter], Mapping[str, Tensor]]
) -> dict[str, list[Part]]:
    """Parameter -> the parts that have a value for it."""
    names = dict.fromkeys(name for part in parts for name in values_of(part.adapter))
    return {name: [part for part in parts if name in values_of(part.adapter)] for name in names}


def _is_settled(having: Sequence[Part]) -> bool:
    """Weights that sum to 1: the base's own value has the weight 0."""
    return abs(sum(part.weight for part in having) - 1) <= 1e-12


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
        BaseMismatchError: two parts have different shapes.
        SpecError: the base is needed and not given.
    """
    combined: dict[str, Tensor] = {}
    for name, having in _holders(parts, values_of).items():
        values = [values_of(part.adapter)[name] for part in having]
        _require_one_shape(name, having, values)
        if len(having) == 1 and having[0].weight == 1:
            combined[name] = values[0]
            continue
        result = torch.zeros_like(values[0], dtype=torch.float64)
        for part, value in zip(having, values, strict=True):
            result += part.weight * value.double()
        if not _is_settled(having):
            rest = 1 - sum(part.weight for part in having)
            result += rest * _base_value(base, f"{name}{ending}", having).double()
        combined[name] = result.to(reduce(torch.promote_types, (v.dtype for v in values)))
    return combined


def _require_one_shape(name: str, having: Sequence[Part], values: Sequence[Tensor]) -> None:
    shapes = {tuple(value.shape): part.name for part, value in zip(having, values, strict=True)}
    if len(shapes) > 1:
        raise BaseMismatchError(
            "two parts replace one parameter with different shapes: heads of different classes, or "
            "vocabularies of different sizes",
            where=name,
            found=", ".join(f"{part} {shape}" for shape, part in shapes.items()),
            remedy="compose adapters of one task's classes and one vocabulary",
        )


def _base_value(base: nn.Module | None, name: str, having: Sequence[Part]) -> Tensor:
    names = ", ".join(f"{part.name}={part.weight:g}" for part in having)
    if base is None:
        raise SpecError(
            "a parameter is trained beside; what an adapter changes of it depends on the base",
            where=name,
            found=names,
            remedy="give the base (compose(..., base=model), --base REF), or weights that sum to 1 "
            "over parts that all have the parameter",
        )
    owner, _, leaf = name.rpartition(".")
    return base_modules(base)[owner].get_parameter(leaf).detach().cpu()
