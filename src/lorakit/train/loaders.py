"""Loaders whose batches depend on the seed and the epoch alone, and know their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorakit.data.sampling import LengthGroupedSampler
from lorakit.train.objectives.base import ExampleSet

ROWS = "rows"

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Any]], Batch]


def training_loader(
    examples: ExampleSet, sampler: LengthGroupedSampler, collate: Collate, *, pin_memory: bool
) -> DataLoader[Any]:
    """The batches of the sampler's epoch; each carries its rows' indices, int64 (batch,)."""
    return DataLoader(
        examples,  # pyright: ignore[reportArgumentType] - a sequence is a map-style data set
        batch_size=sampler.batch_size,
        sampler=sampler,
        collate_fn=_with_rows(collate),
        pin_memory=pin_memory,
        # Without a generator of its own the loader draws from the global one at each epoch.
        generator=torch.Generator().manual_seed(0),
    )


def validation_batches(examples: ExampleSet, collate: Collate, batch_size: int) -> Iterable[Batch]:
    """Every example once, in batches of similar length, longest first."""
    lengths = examples.lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])


def _with_rows(collate: Collate) -> Collate:
    def collate_with_rows(examples: Sequence[Any]) -> Batch:
        return {**collate(examples), ROWS: torch.tensor([e.row for e in examples])}

    return collate_with_rows
