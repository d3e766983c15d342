"""What a saved adapter says about its base, and whether a model is that base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attachments import find_attachments
from lorakit.adapters.fingerprint import Fingerprint, fingerprint
from lorakit.adapters.targets import base_modules, model_type_of
from lorakit.errors import BaseMismatchError
from lorakit.weights.storage import storage_of


def base_facts(model: nn.Module, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The base's fingerprint, name and architecture, as plain values; changes nothing.

    Args:
        model: the base, with or without adapters attached.
        left_out: modules whose values are not the base's (heads that start at random).
    """
    record = find_attachments(model)
    if record is not None and record.base_fingerprint is not None:
        found = record.base_fingerprint
    elif any(parameter.is_meta for parameter in model.parameters()):
        # A model that is only planned has no values, and what it says has no fingerprint.
        found = {}
    else:
        found = fingerprint(model, left_out=left_out).to_json()
    config: Any = getattr(model, "config", None)
    return {
        **found,
        "name": str(getattr(config, "name_or_path", "") or ""),
        # Where the base is in shards its class is one that torch made of its own.
        "architecture": next(
            kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)
        ),
        "model_type": model_type_of(model),
        "storage": storage_of(base_modules(model).values()),
    }


def adapter_sha256(adapter: Adapter) -> str:
    """SHA-256 of what an adapter computes: its sites, scalings and numbers."""
    digest = hashlib.sha256()

    def add(name: str, *tensors: Tensor | None) -> None:
        digest.update(name.encode())
        for tensor in tensors:
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().tobytes())

    for name, factors in sorted(adapter.factors.items()):
        add(f"{name} {factors.scaling!r}", factors.A, factors.B, factors.magnitude)
    for name, value in sorted([*adapter.biases.items(), *adapter.overrides.items()]):
        add(name, value)
    for name, tokens in sorted(adapter.tokens.items()):
        add(f"{name} {tokens.indices}", tokens.rows)
    return digest.hexdigest()


def require_same_base(
    model: nn.Module,
    passport: Mapping[str, Any],
    *,
    taken: MutableMapping[tuple[str, ...], Fingerprint] | None = None,
) -> None:
    """Refuse a model that is not the base in the passport; a passport without one says nothing.

    Args:
        model: the base.
        passport: the adapter's.
        taken: fingerprints of this very model that were taken before, by what they leave out; a
            new one is added.

    Raises:
        BaseMismatchError: other layers, shapes or weights.
    """
    facts = passport.get("base")
    if not isinstance(facts, Mapping) or "samples" not in facts:
        return
    made_on = Fingerprint.from_json(facts)
    here = (taken or {}).get(made_on.left_out) or fingerprint(model, left_out=made_on.left_out)
    if taken is not None:
        taken[made_on.left_out] = here
    difference = made_on.difference(here)
    if difference:
        config: Any = getattr(model, "config", None)
        raise BaseMismatchError(
            "this adapter was made for another base model",
            expected=f"{facts.get('name') or 'unnamed'} ({made_on.sha256[:12]})",
            found=f"{getattr(config, 'name_or_path', None) or 'unnamed'} "
            f"({here.sha256[:12]}): {difference}",
            remedy="load that base, or ask for any base by name: any_base=True, --any-base",
        )
