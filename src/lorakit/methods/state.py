"""Learned tensors into a model, strictly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError

_SHOWN = 12


def load_in_place(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a state into the live tensors of the same names, in place and bit for bit.

    Args:
        mine: the live tensors, as `Method.state` gives them; mutated.
        state: what to put there.

    Raises:
        AdapterFileError: names or shapes differ, or a value is not finite; nothing was copied.
    """
    problems = [f"missing: {name}" for name in mine if name not in state]
    problems += [f"extra: {name}" for name in state if name not in mine]
    for name, value in state.items():
        if name not in mine:
            continue
        if mine[name].shape != value.shape:
            shapes = f"expected {tuple(mine[name].shape)}, found {tuple(value.shape)}"
            problems.append(f"misshapen: {name}: {shapes}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            problems.append(f"not finite: {name}")
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise AdapterFileError(
            "the learned tensors do not fit this method on this model",
            found="\n".join([*problems[:_SHOWN], *more]),
            remedy="use the options and the model they were made with",
        )
    with torch.no_grad():
        for name, value in state.items():
            mine[name].copy_(value)
