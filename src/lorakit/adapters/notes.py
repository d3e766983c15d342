"""What the user should know about a plan, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from lorakit.layers.kinds import Shape


class _Sized(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def r(self) -> int: ...
    @property
    def shape(self) -> Shape: ...


def rank_notes(sites: Iterable[_Sized]) -> list[str]:
    """Say where the rank exceeds the matrix."""
    too_high = [s for s in sites if s.r > min(s.shape[0], math.prod(s.shape[1:]))]
    if not too_high:
        return []
    first = too_high[0]
    return [
        f"the rank exceeds the size of {len(too_high)} matrices, first {first.name}: r={first.r} "
        f"on {first.shape[0]} x {math.prod(first.shape[1:])}; a smaller rank loses nothing"
    ]


def tie_notes(modules: Mapping[str, nn.Module], changed: Sequence[str]) -> list[str]:
    """Say which adapted weights are shared, and that merging will untie them."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name == "weight":
                owners.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in owners.values() if len(names) > 1 for name in names}
    return [
        f"{name} shares its weight with {', '.join(n for n in tied[name] if n != name)}: the "
        f"adapter changes {name} only, and a merge gives it a weight of its own"
        for name in dict.fromkeys(changed)
        if name in tied
    ]


def expert_notes(
    modules: Mapping[str, nn.Module], targets: Sequence[str], taken: Sequence[str]
) -> list[str]:
    """Say what stacked expert weights, which are single tensors, mean for an adapter.

    Args:
        modules: the base's modules by name.
        targets: as the user wrote them.
        taken: adapted layers that PEFT will take for experts.
    """
    stacked = [
        f"{name}.{parameter_name}"
        for name, module in modules.items()
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and "expert" in name
    ]
    notes: list[str] = []
    if stacked and {"all-linear", "mlp"} & set(targets):
        notes.append(
            f"{len(stacked)} stacks of expert weights are not adapted, first {stacked[0]}: they "
            "are single tensors, not layers"
        )
    if taken:
        notes.append(
            f"PEFT from 0.19 on takes {taken[0]} and others of its name for experts, and does not "
            "load a DoRA adapter on them; lorakit does, and a merged model needs no PEFT"
        )
    return notes
