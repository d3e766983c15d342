"""Write the merged checkpoint: one shard in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import MergeError
from lorakit.files import write_json
from lorakit.merging.plan import MergePlan, TensorChange, changed_value, updated_config
from lorakit.models.checkpoint import copy_companions, unreadable
from lorakit.progress import track

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredChange:
    """What became of one tensor after rounding to the stored dtype.

    Attributes:
        name: the tensor.
        dtype: as stored.
        delta_norm: Frobenius norm of the wanted change.
        max_abs_error: largest difference between the wanted and the stored value.
        survival: <stored change, wanted change> / ||wanted change||^2; 1 when nothing is lost.
    """

    name: str
    dtype: str
    delta_norm: float
    max_abs_error: float
    survival: float


def write_shards(plan: MergePlan, output: Path) -> list[StoredChange]:
    """Write weights, configuration and tokenizer of the merged model.

    Args:
        plan: what to write.
        output: an existing, empty directory.

    Returns:
        What became of each changed tensor, in order.

    Raises:
        MergeError: a merged weight is not finite.
        ModelError: a shard of the base cannot be read.
    """
    changes: list[StoredChange] = []
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file in track(plan.files, "merging shards"):
        names, stored_bytes = _write_shard(plan, file, output, changes)
        weight_map.update(dict.fromkeys(names, file.name))
        total_bytes += stored_bytes
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(output / _INDEX, index)
    copy_companions(plan.directory, output)
    write_json(output / "config.json", updated_config(plan.directory, untied=plan.untied))
    return changes


def _write_shard(
    plan: MergePlan, file: Path, output: Path, changes: list[StoredChange]
) -> tuple[list[str], int]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as source:
            metadata = source.metadata() or {"format": "pt"}
            for name in source.keys():  # noqa: SIM118
                stored = source.get_tensor(name)
                planned = plan.changes.get(name, ())
                if not any(change.target == name for change in planned):
                    tensors[name] = stored
                for change in planned:
                    value, report = _merge_one(plan, change, stored)
                    tensors[change.target] = value
                    if report is not None:
                        changes.append(report)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error
    save_file(tensors, str(output / file.name), metadata=metadata)
    return list(tensors), sum(t.numel() * t.element_size() for t in tensors.values())


def _merge_one(
    plan: MergePlan, change: TensorChange, stored: Tensor
) -> tuple[Tensor, StoredChange | None]:
    if change.module is None and change.override is None:
        # Tied to something that changes: from now on it has values of its own.
        return stored.clone(), None
    delta, wanted = changed_value(change, stored, plan.adapter)
    value = wanted.to(stored.dtype)
    if not bool(torch.isfinite(value).all()):
        raise MergeError(
            "a merged weight is not finite",
            where=change.target,
            found=f"the largest change is {float(delta.abs().max()):.3g}, stored as {stored.dtype}",
            remedy="check the adapter, or merge into a wider dtype",
        )
    actual = value.to(wanted.dtype) - stored.to(wanted.dtype)
    wanted_square = float((delta * delta).sum())
    survival = float((actual * delta).sum()) / wanted_square if wanted_square else 1.0
    return value, StoredChange(
        name=change.target,
        dtype=str(stored.dtype).removeprefix("torch."),
        delta_norm=wanted_square**0.5,
        max_abs_error=float((value.to(wanted.dtype) - wanted).abs().max()),
        survival=survival,
    )
