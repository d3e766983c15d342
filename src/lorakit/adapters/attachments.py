"""What is attached to a model: the plans by name, the routing, and how to undo it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorakit.adapters.plan import AdapterPlan
from lorakit.errors import StateError, nearest
from lorakit.layers.adapted import AdaptedLayer, Wrapper
from lorakit.layers.overridden import OverriddenModule
from lorakit.layers.routing import Routing
from lorakit.weights.base import BaseWeight

_ATTRIBUTE = "_lorakit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Attachments:
    """The record that travels with the model, under one private attribute.

    Attributes:
        routing: which adapter runs.
        plans: adapter name -> what it does where.
        passports: adapter name -> the passport it was loaded with, if any.
        required_grad: parameter name -> requires_grad before the first attach.
        base_fingerprint: the base's identity, taken before a merge changed its weights.
        kept: what unmerge restores: each written weight and what was there before.
        skips_before: the configuration's list of layers that are not quantized, before a merge
            made some of them dense.
        untied_config: the configuration whose tie a merge had to switch off, if it had to.
    """

    routing: Routing = field(default_factory=Routing)
    plans: dict[str, AdapterPlan] = field(default_factory=dict[str, AdapterPlan])
    passports: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    required_grad: dict[str, bool] = field(default_factory=dict[str, bool])
    kept: list[tuple[BaseWeight, object]] = field(default_factory=list[tuple[BaseWeight, object]])
    skips_before: tuple[list[str] | None] | None = None
    untied_config: Any = None
    base_fingerprint: dict[str, Any] | None = None


def find_attachments(model: nn.Module) -> Attachments | None:
    """The model's record, or None when nothing is attached."""
    record = model.__dict__.get(_ATTRIBUTE)
    return record if isinstance(record, Attachments) else None


def attachments_of(model: nn.Module) -> Attachments:
    """The model's record.

    Raises:
        StateError: nothing is attached.
    """
    record = find_attachments(model)
    if record is None:
        raise StateError(
            "no adapter is attached to this model",
            where=type(model).__name__,
            remedy="attach(model, LoraSpec(...)) or load_adapter(model, path) first",
        )
    return record


def start_attachments(model: nn.Module) -> Attachments:
    """The model's record, begun if there is none."""
    record = find_attachments(model)
    if record is None:
        record = Attachments()
        model.__dict__[_ATTRIBUTE] = record
    return record


def end_attachments(model: nn.Module) -> None:
    """Forget the model's record."""
    model.__dict__.pop(_ATTRIBUTE, None)


def require_attached(model: nn.Module, name: str) -> AdapterPlan:
    """The plan of an attached adapter.

    Raises:
        StateError: no adapter of that name is attached.
    """
    plans = attachments_of(model).plans
    if name not in plans:
        close = nearest(name, plans, n=1)
        raise StateError(
            f"no adapter named {name!r} is attached",
            found=", ".join(plans) or "none",
            remedy=f"did you mean {close[0]!r}?" if close else None,
        )
    return plans[name]


def refuse_merged(model: nn.Module) -> None:
    """Refuse to go on while an adapter is merged.

    Raises:
        StateError: an adapter is merged into the weights.
    """
    record = find_attachments(model)
    if record is not None and record.routing.merged:
        raise StateError(
            "an adapter is merged into the weights",
            found=", ".join(record.routing.merged),
            remedy="unmerge(model) first, or detach(model) to keep the merged weights as the base",
        )


def check_name(name: str) -> None:
    """Refuse a name that could not be a file name.

    Raises:
        StateError: the name is empty, or has a slash, a leading dot or other odd characters.
    """
    if not _NAME.fullmatch(name):
        raise StateError(
            "this cannot be the name of an adapter",
            found=repr(name),
            expected="letters, digits, '_', '-' and '.', starting with a letter or digit",
            remedy="choose another name; a path is given separately",
        )


def outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The base's modules and the wrappers around them, each once, without what adapters hold.

    Unlike `model.modules()` it takes the same time however many adapters are attached.
    """
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        inside = [module.base] if isinstance(module, Wrapper) else module._modules.values()
        waiting.extend(child for child in reversed(list(inside)) if child is not None)


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every wrapped layer, once."""
    return (module for module in outer_modules(model) if isinstance(module, AdaptedLayer))


def overridden_modules(model: nn.Module) -> Iterator[OverriddenModule]:
    """Every module with replaced parameters, once."""
    return (module for module in outer_modules(model) if isinstance(module, OverriddenModule))


def places(outer: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """id(module) -> every (parent, attribute) that holds it; shared modules have several.

    Args:
        outer: `outer_modules` of the model.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in outer:
        # Not named_children(): it leaves out a second attribute that holds the same child.
        for attribute, child in parent._modules.items():
            if child is not None and not isinstance(parent, Wrapper):
                found.setdefault(id(child), []).append((parent, attribute))
    return found
