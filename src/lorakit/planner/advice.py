"""What to change when a run does not fit, ranked by what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from lorakit.adapters.spec import LoraSpec
from lorakit.errors import LorakitError
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.planner.memory import TrainingSetup, estimate_training
from lorakit.planner.step import BatchShape
from lorakit.progress import progress


@dataclass(frozen=True, slots=True)
class Change:
    """One change to a run.

    Attributes:
        what: the change, in the words of a training config.
        total_bytes: the run's memory with it.
        saved_bytes: how much less that is.
    """

    what: str
    total_bytes: int
    saved_bytes: int


_Run = tuple[Method, BatchShape, TrainingSetup]


def rank_changes(
    model: PreTrainedModel, method: Method, batch: BatchShape, setup: TrainingSetup
) -> list[Change]:
    """Every change that saves memory, alone and all together, the largest saving first.

    Args:
        model: the base on the meta device.
        method: what is trained.
        batch: the largest batch.
        setup: how the numbers are held.
    """
    before = estimate_training(model, method, batch, setup).memory.total_bytes
    found: list[Change] = []
    together: _Run = (method, batch, setup)
    changes = list(_changes(method, batch, setup))
    with progress("what would save memory", len(changes) + 1) as bar:
        for what, run in changes:
            change = _tried(model, what, run, before)
            bar.advance()
            if change is None:
                continue
            found.append(change)
            together = _both(together, run, (method, batch, setup))
        change = _tried(model, "all of these", together, before) if len(found) > 1 else None
        if change is not None:
            found.append(change)
        bar.advance()
    return sorted(found, key=lambda change: -change.saved_bytes)


def _changes(method: Method, batch: BatchShape, setup: TrainingSetup) -> Iterator[tuple[str, _Run]]:
    if not setup.checkpointing:
        yield (
            "train.gradient_checkpointing: true (about a third more time)",
            (method, batch, replace(setup, checkpointing=True)),
        )
    if batch.rows > 1:
        one = replace(batch, rows=1, labels=max(1, batch.labels // batch.rows))
        yield (
            f"train.batch_size: 1 with train.gradient_accumulation: {batch.rows}",
            (method, one, setup),
        )
    if batch.length > 1:
        half = replace(batch, length=batch.length // 2, labels=max(1, batch.labels // 2))
        yield f"data.max_length: {half.length}", (method, half, setup)
    if setup.dtype == torch.float32:
        narrow = replace(setup, dtype=torch.bfloat16, bf16=True)
        yield "model.dtype: bfloat16", (method, batch, narrow)
    if not setup.four_bit:
        yield "model.quantize: nf4", (method, batch, replace(setup, four_bit=True))
    yield from _smaller_methods(method, batch, setup)


def _smaller_methods(
    method: Method, batch: BatchShape, setup: TrainingSetup
) -> Iterator[tuple[str, _Run]]:
    if not isinstance(method, LoraMethod):
        yield "method: lora, its defaults", (LoraMethod(LoraSpec()), batch, setup)
        return
    spec = method.spec
    if isinstance(spec.r, int) and spec.r > 1:
        smaller = replace(spec, r=spec.r // 2)
        yield f"lora.r: {smaller.r}", (LoraMethod(smaller), batch, setup)
    if spec.targets != "qv":
        fewer = replace(spec, targets="qv", rank_pattern={}, alpha_pattern={})
        yield "lora.targets: qv", (LoraMethod(fewer), batch, setup)


def _both(together: _Run, run: _Run, start: _Run) -> _Run:
    """The changes so far and one more: whatever it changes of the start replaces what was there."""
    method = run[0] if run[0] is not start[0] else together[0]
    batch = BatchShape(
        rows=min(together[1].rows, run[1].rows),
        length=min(together[1].length, run[1].length),
        labels=min(together[1].labels, run[1].labels),
    )
    setup = replace(
        together[2],
        checkpointing=together[2].checkpointing or run[2].checkpointing,
        four_bit=together[2].four_bit or run[2].four_bit,
        bf16=together[2].bf16 or run[2].bf16,
        dtype=min(together[2].dtype, run[2].dtype, key=lambda dtype: dtype.itemsize),
    )
    return method, batch, setup


def _tried(model: PreTrainedModel, what: str, run: _Run, before: int) -> Change | None:
    try:
        after = estimate_training(model, *run).memory.total_bytes
    except LorakitError:
        # Not for this method or model: full fine-tuning has no 4-bit form.
        return None
    return Change(what, after, before - after) if after < before else None
