"""Loaders whose batches depend on the seed and the epoch alone, and know their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lorakit.data.sampling import LengthGroupedSampler
from lorakit.processes import Processes
from lorakit.train.objectives.base import ExampleSet

ROWS = "rows"

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Any]], Batch]


class OwnShare(Sampler[list[int]]):
    """This process's rows of every batch that the processes take together.

    Together they take the rows that one process with `num` times the batch size would, in the same
    order. Rows of a batch are dealt out in turn, so that each process has about as many tokens. Of
    an epoch's last rows there may be none left for some: these look at the batch's first row, given
    as ~index, which does not count.

    Args:
        sampler: the order of all rows, made for `processes.num`.
        processes: those that share it.
    """

    def __init__(self, sampler: LengthGroupedSampler, processes: Processes) -> None:
        self._sampler = sampler
        self._processes = processes
        self._together = sampler.batch_size * processes.num

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._together)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._sampler)
        for start in range(0, len(order), self._together):
            rows = order[start : start + self._together]
            yield rows[self._processes.rank :: self._processes.num] or [~rows[0]]


@dataclass(frozen=True, slots=True)
class _Idle:
    """An example that is looked at and not trained on."""

    example: Any


class _Rows(Dataset[Any]):
    """Examples by index; by ~index as idle ones."""

    def __init__(self, examples: ExampleSet) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        return self._examples[index] if index >= 0 else _Idle(self._examples[~index])


def training_loader(
    examples: ExampleSet,
    sampler: LengthGroupedSampler,
    collate: Collate,
    *,
    pin_memory: bool,
    processes: Processes,
) -> DataLoader[Any]:
    """The batches of the sampler's epoch; each carries its rows' indices, int64 (batch,).

    A batch without rows is there to be looked at by a process that has none left.
    """
    return DataLoader(
        _Rows(examples),
        batch_sampler=OwnShare(sampler, processes),
        collate_fn=_with_rows(collate),
        pin_memory=pin_memory,
        # Without a generator of its own the loader draws from the global one at each epoch.
        generator=torch.Generator().manual_seed(0),
    )


def validation_batches(
    examples: ExampleSet, collate: Collate, batch_size: int, processes: Processes | None = None
) -> Iterable[Batch]:
    """Every example once, in batches of similar length, longest first; this process's share."""
    processes = processes or Processes()
    lengths = examples.lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(processes.rank * batch_size, len(order), processes.num * batch_size):
        yield collate([examples[i] for i in order[start : start + batch_size]])


def _with_rows(collate: Collate) -> Collate:
    def collate_with_rows(examples: Sequence[Any]) -> Batch:
        if isinstance(examples[0], _Idle):
            return {**collate([examples[0].example]), ROWS: torch.zeros(0, dtype=torch.long)}
        return {**collate(examples), ROWS: torch.tensor([e.row for e in examples])}

    return collate_with_rows
