"""Write the merged checkpoint: one tensor in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorakit.errors import MergeError, OutputError
from lorakit.files import write_json
from lorakit.merging.plan import MergePlan, TensorChange, changed_blocks, updated_config
from lorakit.merging.stream import SourceFile, Stored, write_header, write_tensor
from lorakit.models.checkpoint import copy_companions
from lorakit.progress import track

_INDEX = "model.safetensors.index.json"
_BLOCK = 1 << 18  # numbers: a megabyte in float32


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
    with SourceFile(file) as source:
        # A tied tensor that is untied by the merge is written under each of its names.
        order: list[tuple[Stored, TensorChange | None]] = []
        for stored in source.tensors:
            planned = plan.changes.get(stored.name, ())
            if not any(change.target == stored.name for change in planned):
                order.append((stored, None))
            order += [(stored.renamed(change.target), change) for change in planned]
        try:
            with (output / file.name).open("wb") as target:
                num_bytes = write_header(target, [entry for entry, _ in order], source.metadata)
                for entry, change in order:
                    report = _write_one(plan, source, target, entry, change)
                    if report is not None:
                        changes.append(report)
        except OSError as error:
            raise OutputError(
                "the merged shard cannot be written",
                where=str(output / file.name),
                found=str(error),
                remedy="free some space on the disk",
            ) from error
    return [entry.name for entry, _ in order], num_bytes


def _write_one(
    plan: MergePlan,
    source: SourceFile,
    target: BinaryIO,
    entry: Stored,
    change: TensorChange | None,
) -> StoredChange | None:
    if change is None or not (change.module or change.override or change.tokens):
        # Not changed; or tied to something that changes, and from now on with values of its own.
        source.copy(entry, target)
        return None
    value, report = _merge_one(plan, change, source.read(entry))
    write_tensor(target, value)
    return report


def _merge_one(
    plan: MergePlan, change: TensorChange, stored: Tensor
) -> tuple[Tensor, StoredChange]:
    changed = changed_blocks(change, stored, plan.adapter)
    value = torch.atleast_1d(stored)
    # In blocks that stay in the processor's cache from the product to the norms: what a merge takes
    # is the time to walk through memory. The sum takes the place of what was stored.
    step = max(1, _BLOCK * len(value) // max(1, value.numel()))
    lowest = highest = square = off = 0.0
    for start in range(0, len(value), step):
        here = slice(start, start + step)
        delta, wanted = changed(here)
        rounded = value[here].copy_(wanted)
        error = rounded - wanted
        least, most = (float(bound) for bound in torch.aminmax(error))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise _not_finite(change, delta, stored.dtype)
        lowest, highest = min(lowest, least), max(highest, most)
        flat = delta.reshape(-1)
        square += float(torch.dot(flat, flat))
        off += float(torch.dot(error.reshape(-1), flat))
    return stored, StoredChange(
        name=change.target,
        dtype=str(stored.dtype).removeprefix("torch."),
        delta_norm=square**0.5,
        max_abs_error=max(-lowest, highest),
        # <value - base, delta>, where value - base = delta + error.
        survival=(square + off) / square if square else 1.0,
    )


def _not_finite(change: TensorChange, delta: Tensor, stored: torch.dtype) -> MergeError:
    return MergeError(
        "a merged weight is not finite",
        where=change.target,
        found=f"the largest change is {float(delta.abs().max()):.3g}, stored as {stored}",
        remedy="check the adapter, or merge into a wider dtype",
    )
