"""Merge an adapter into live weights, and take it out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachments import (
    Attachments,
    adapted_layers,
    attachments_of,
    overridden_modules,
    refuse_merged,
    require_attached,
)
from lorakit.adapters.fingerprint import fingerprint
from lorakit.adapters.plan import whole_modules
from lorakit.adapters.quantized import leave_dense, restore_skips
from lorakit.adapters.targets import bare_model
from lorakit.errors import MergeError, StateError
from lorakit.layers.adapted import AdaptedLayer
from lorakit.layers.thawed import ThawedWeight
from lorakit.math.survival import Survival, survival
from lorakit.weights.base import BaseWeight
from lorakit.weights.nf4 import FourBitWeight, is_four_bit
from lorakit.weights.storage import base_weight


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        num_weights: weights written.
        kept_bytes: memory the kept originals take until `unmerge` or `detach`, in bytes.
        untied: modules that got a weight of their own because theirs was shared.
        survival: layer -> what is left of the change, where it was quantized again.
    """

    num_weights: int
    kept_bytes: int
    untied: tuple[str, ...]
    survival: dict[str, Survival] = field(default_factory=dict[str, Survival])


def merge(
    model: nn.Module, name: str = "default", *, keep: bool = True, requantize: bool = False
) -> Merged:
    """Fold an adapter into the base weights, in float32, stored as W0 was.

    W = W0 + s B A for LoRA, m (W0 + s B A) / ||W0 + s B A||_c for DoRA.

    The model then runs at the base's speed, with this adapter on for every row. Mutates `model`;
    the adapter itself is not changed. The original parameters are kept so that `unmerge` restores
    the very bits: this costs the memory of the touched weights once more (`kept_bytes`). A weight
    shared with another module is untied, and the configuration says so.

    A 4-bit weight is multiplied out and the sum stays dense, in the dtype computed in: nothing of
    the adapter is lost, and the layer takes the memory of a dense one.

    Args:
        model: a model with the adapter attached.
        name: the adapter.
        keep: keep the originals for `unmerge`; without, the merge cannot be undone and costs no
            more than one weight at a time.
        requantize: store sums of 4-bit weights in 4 bits again. Most adapters are smaller than a
            step of 4 bits: look at `Merged.survival`.

    Raises:
        StateError: not attached, or another adapter is merged already.
        MergeError: a merged weight would not be finite; nothing is changed.
    """
    model = bare_model(model)
    plan = require_attached(model, name)
    refuse_merged(model)
    record = attachments_of(model)
    if requantize:
        _require_four_bit(model, name)
    base = fingerprint(model, left_out=whole_modules(plan)).to_json()
    untied = tuple(_shared_with_others(model, name))
    if not keep:
        # Nothing could be put back: look at every value before the first one is written.
        for one in _merged_values(model, name, requantize):
            _require_finite(one.where, one.value)
    written: list[tuple[BaseWeight, object]] = []
    kept_bytes = num_weights = 0
    left: dict[str, Survival] = {}
    dense: list[str] = []
    try:
        for one in _merged_values(model, name, requantize):
            _require_finite(one.where, one.value)
            if keep:
                kept_bytes += one.weight.kept_bytes()
                written.append((one.weight, one.weight.keep()))
            num_weights += 1
            if isinstance(one.weight, FourBitWeight) and one.delta is not None:
                before = one.weight.read()
                one.weight.write(one.value)
                left[one.where] = survival(before, one.weight.read(), one.delta)
            else:
                one.weight.write(one.value)
            if isinstance(one.weight, ThawedWeight):
                dense.append(one.where)
    except BaseException:
        _restore(written)
        raise
    record.kept = written
    record.base_fingerprint = base
    record.routing.merged.append(name)
    record.routing.active = name
    if untied:
        _untie(model, record)
    record.skips_before = leave_dense(model, dense)
    return Merged(num_weights, kept_bytes, untied, left)


def unmerge(model: nn.Module) -> None:
    """Bring back the weights that were there before `merge`, bit for bit; mutates `model`.

    The adapter that was merged stays attached and active.

    Raises:
        StateError: nothing is merged.
    """
    model = bare_model(model)
    record = attachments_of(model)
    if not record.routing.merged:
        raise StateError("no adapter is merged", remedy="merge(model, name) first")
    if not record.kept:
        raise StateError(
            "the merge cannot be undone: the original weights were not kept",
            remedy="load the base again, or merge with keep=True",
        )
    _restore(record.kept)
    record.kept = []
    record.base_fingerprint = None
    record.routing.merged.clear()
    if record.untied_config is not None:
        record.untied_config.tie_word_embeddings = True
        record.untied_config = None
    restore_skips(model, record.skips_before)
    record.skips_before = None


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """W0 + delta, added in float32 (or wider), rounded once to W0's dtype.

    Args:
        weight: W0, any floating dtype.
        delta: s B A, float32, same shape.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(device=weight.device, dtype=wide)).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class _Sum:
    where: str
    weight: BaseWeight
    value: Tensor
    delta: Tensor | None = None


def _merged_values(model: nn.Module, name: str, requantize: bool) -> Iterator[_Sum]:
    for layer in adapted_layers(model):
        branch = layer.branch_of(name)
        if branch is None:
            continue
        thaw = is_four_bit(layer.base) and not requantize
        weight = ThawedWeight(layer) if thaw else base_weight(layer.base)
        delta = layer.delta(name)
        yield _Sum(layer.name, weight, merged_weight(weight.read(), delta), delta)
        if branch.bias is not None:
            bias = base_weight(layer.base, "bias")
            value = branch.bias.detach().to(bias.read().dtype)
            yield _Sum(f"{layer.name}.bias", bias, value)
    for module in overridden_modules(model):
        override = module.override_of(name)
        if override is not None:
            for parameter, value in override.tensors().items():
                where = f"{module.name}.{parameter}"
                target = base_weight(module.base, parameter)
                yield _Sum(where, target, value.detach().to(target.read().dtype))


def _require_four_bit(model: nn.Module, name: str) -> None:
    layers = [layer for layer in adapted_layers(model) if layer.branch_of(name) is not None]
    if not any(is_four_bit(layer.base) for layer in layers):
        raise StateError(
            "there is nothing to quantize again: the adapter's layers are dense",
            where="requantize",
            remedy="leave requantize out, or load the base with quantize='nf4'",
        )


def _require_finite(where: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise MergeError(
            "a merged weight is not finite",
            where=where,
            remedy="check the adapter with `lorakit inspect`, or merge into a wider dtype",
        )


def _restore(written: list[tuple[BaseWeight, object]]) -> None:
    for weight, kept in reversed(written):
        weight.restore(kept)


def _shared_with_others(model: nn.Module, name: str) -> Iterator[str]:
    """Names of changed modules whose weight another module holds too."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for wrapper in [*adapted_layers(model), *overridden_modules(model)]:
        changes = (
            wrapper.branch_of(name)
            if isinstance(wrapper, AdaptedLayer)
            else wrapper.override_of(name)
        )
        if changes is not None and any(owners[id(p)] > 1 for p in wrapper.base.parameters()):
            yield wrapper.name


def _untie(model: nn.Module, record: Attachments) -> None:
    """Say in the configuration that nothing is tied any more, or a reload would tie it again."""
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        record.untied_config = config
