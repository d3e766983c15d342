"""Learned tensors out of a model and back into it, bit for bit and strictly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.adapters.attachments import adapted_layers, overridden_modules
from lorakit.errors import AdapterFileError
from lorakit.layers.adapted import module_key

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


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The live tensors of one attached adapter: `<module>.parts.<index>.lora_A` and so on."""
    key = module_key(name)
    found: dict[str, Tensor] = {}
    for layer in adapted_layers(model):
        if key in layer.factors:
            for own, parameter in layer.factors[key].named_parameters():
                found[f"{layer.name}.{own}"] = parameter
            # (A0, B0) of a start like PiSSA's: without them B A means nothing.
            for own, buffer in layer.factors[key].named_buffers():
                found[f"{layer.name}.{own}"] = buffer
    for module in overridden_modules(model):
        if key in module.overrides:
            for own, parameter in module.overrides[key].named_parameters():
                found[f"{module.name}.{own}"] = parameter
    return found


def data_was_seen(model: nn.Module, name: str) -> None:
    """Note that the adapter's factors are what they should be: loaded, or taken from data."""
    for layer in adapted_layers(model):
        branch = layer.branch_of(name)
        for update in branch.updates() if branch is not None else ():
            update.awaits_data = False
            update.norms.clear()
