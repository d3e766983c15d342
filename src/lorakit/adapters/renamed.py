"""An adapter's names for layers that this model has under other modules.

Classes move their layers: Gemma 3's text part was `language_model.model` before transformers 4.52
and is `model.language_model` since; a body without a head has `layers.0` where the causal model has
`model.layers.0`. The layers themselves keep their names from the first numbered list on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import TypeVar

from torch import nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.targets import input_embedding
from lorakit.errors import LorakitWarning

_Value = TypeVar("_Value")


def under_its_names(
    model: nn.Module, modules: Mapping[str, nn.Module], adapter: Adapter
) -> Adapter:
    """The adapter with this model's names, where all its layers lie inside another module.

    Only where one module of the model, around its input embedding, holds every layer under the
    adapter's own name for the rest; else the adapter as it is. Shapes are not looked at.

    Args:
        model: the base; not changed.
        modules: its modules by name.
        adapter: not changed.

    Warns:
        LorakitWarning: names are changed.
    """
    layers = [name for name in map(_layer, adapter.factors.values()) if _list_in(name) is not None]
    if all(layer in modules for layer in layers):
        return adapter
    theirs = _around(layers)
    embedding = input_embedding(model)
    for ours in _outwards(embedding[0] if embedding else ""):
        moved = [_moved(layer, theirs, ours) for layer in layers]
        if all(name in modules for name in moved):
            break
    else:
        return adapter

    def new_name(name: str) -> str:
        return name if name in modules else _nearest(name, theirs, ours, modules)

    warnings.warn(
        f"the adapter's layers are in {theirs or 'the model itself'}, and here in "
        f"{ours or 'the model itself'}: they are taken for the same",
        LorakitWarning,
        stacklevel=4,
    )
    # What was targeted was targeted in there: other parts (a vision tower) may have such names too.
    inside = tuple(_inside(ours, target) for target in adapter.target_modules)
    known = inside if all(inside) else ()
    return replace(_renamed(adapter, new_name), target_modules=known)


def _inside(module: str, target: str) -> str:
    """An expression for this end of a name inside a module; empty for an expression."""
    if not re.fullmatch(r"[\w.-]+", target):
        return ""
    return rf"{re.escape(module)}\.(?:.*\.)?{re.escape(target)}" if module else target


def _layer(factors: Factors) -> str:
    """The module that is adapted, or the one that holds the parameter that is."""
    return factors.module if factors.stack is None else factors.module.rsplit(".", 2)[0]


def _list_in(name: str) -> int | None:
    """Where the first numbered list stands among the components."""
    components = name.split(".")
    return next((i for i, c in enumerate(components[1:]) if c.isdigit()), None)


def _around(layers: Iterable[str]) -> str:
    """The innermost module around the lists that hold all these layers."""
    outer = [layer.split(".")[: _list_in(layer)] for layer in layers]
    alike = takewhile(lambda components: len(set(components)) == 1, zip(*outer, strict=False))
    return ".".join(components[0] for components in alike)


def _outwards(name: str) -> list[str]:
    """The modules around this one, innermost first; the model itself is the last."""
    components = name.split(".")
    return [".".join(components[:end]) for end in range(len(components) - 1, -1, -1)]


def _moved(name: str, theirs: str, ours: str) -> str:
    rest = name[len(theirs) + 1 :] if theirs else name
    return f"{ours}.{rest}" if ours else rest


def _nearest(name: str, theirs: str, ours: str, modules: Mapping[str, nn.Module]) -> str:
    """Inside the module that holds the layers, or what is left of the name beside it."""
    if name.startswith(f"{theirs}." if theirs else ""):
        inside = _moved(name, theirs, ours)
        if inside in modules:
            return inside
    components = name.split(".")
    shorter = (".".join(components[start:]) for start in range(1, len(components)))
    return next((found for found in shorter if found in modules), name)


def _renamed(adapter: Adapter, new_name: Callable[[str], str]) -> Adapter:
    def keys(values: Mapping[str, _Value]) -> dict[str, _Value]:
        return {new_name(name): value for name, value in values.items()}

    factors: dict[str, Factors] = {}
    for name, given in adapter.factors.items():
        layer = _layer(given)
        own = f"{new_name(layer)}{given.module[len(layer) :]}"
        factors[f"{own}{name[len(given.module) :]}"] = replace(given, module=own)
    parameters = ((name.rpartition("."), value) for name, value in adapter.overrides.items())
    return replace(
        adapter,
        factors=factors,
        biases=keys(adapter.biases),
        overrides={f"{new_name(owner)}.{leaf}": value for (owner, _, leaf), value in parameters},
        tokens=keys(adapter.tokens),
        base_norms=keys(adapter.base_norms),
        base_weights=keys(adapter.base_weights),
    )
