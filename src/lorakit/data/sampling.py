"""The order of training: batches of similar length, fixed by seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH_BATCHES = 50
# Between the seeds of two epochs, so that seed 1 epoch 0 is not seed 0 epoch 1.
_EPOCH_STRIDE = 1_000_003


class LengthGroupedSampler(Sampler[int]):
    """Row indices such that each run of `batch_size` indices has rows of similar length.

    Rows are shuffled, cut into megabatches, sorted by length inside each and cut into batches; the
    batches are shuffled again. The first batch of the first epoch is the longest, so that a run
    that does not fit in memory fails at once. Rows left over from the last full batch come last.

    It yields indices, not batches, so that `transformers.Trainer` and accelerate find `set_epoch`
    where they look for it. The order depends on the lengths, the seed and the epoch, and on nothing
    that happened before: a resumed epoch sets the epoch and skips batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one forward pass on one process.
        seed: of all epochs.
        num_processes: processes that take one batch each at the same time; these get batches of
            similar length, since the slowest holds up the others.
        grouped: False shuffles without grouping, with the same guarantees.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        num_processes: int = 1,
        grouped: bool = True,
    ) -> None:
        if batch_size < 1 or num_processes < 1:
            raise ValueError("batch_size and num_processes must be at least 1")
        self._lengths = torch.tensor(list(lengths), dtype=torch.long)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._step_rows = batch_size * num_processes
        self._grouped = grouped

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, for measuring and tests; the last may be short."""
        return [batch.tolist() for batch in self.order(epoch).split(self.batch_size)]

    def order(self, epoch: int) -> torch.Tensor:
        """All row indices in the order of this epoch: int64 (num_rows,)."""
        generator = torch.Generator().manual_seed((self.seed + _EPOCH_STRIDE * epoch) % 2**63)
        order = torch.randperm(len(self), generator=generator)
        if not self._grouped or len(self) <= self._step_rows:
            return order
        order = self._longest_to_front(order)
        num_steps = len(order) // self._step_rows
        full = num_steps * self._step_rows
        steps = self._grouped_steps(order[:full])
        shuffle = torch.randperm(num_steps, generator=generator)
        if epoch == 0:
            first = int(self._lengths[steps].amax(dim=1).argmax())
            shuffle = torch.cat([torch.tensor([first]), shuffle[shuffle != first]])
        return torch.cat([steps[shuffle].flatten(), self._sorted(order[full:])])

    def _longest_to_front(self, order: torch.Tensor) -> torch.Tensor:
        """Keep the longest row out of the rest, which comes last."""
        longest = order[self._lengths[order].argmax()]
        return torch.cat([longest[None], order[order != longest]])

    def _grouped_steps(self, order: torch.Tensor) -> torch.Tensor:
        """Indices (num_steps, rows of a step), similar in length within a row."""
        megabatches = order.split(MEGABATCH_BATCHES * self._step_rows)
        return torch.cat([self._sorted(part) for part in megabatches]).view(-1, self._step_rows)

    def _sorted(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[self._lengths[indices].argsort(descending=True, stable=True)]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of padding among all positions of these batches, 0 to 1."""
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded
