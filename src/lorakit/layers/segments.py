"""What rows of a batch have in common, found: the tree that they are packed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from lorakit.layers.packed import Packing


def pack_rows(
    input_ids: Tensor,
    lengths: Sequence[int],
    first_needed: Sequence[int],
    *,
    share: bool,
    owners: Sequence[str | None] | None = None,
) -> tuple[Packing, Tensor]:
    """The packing of rows padded on the right, and where its tokens come from.

    Args:
        input_ids: (rows, positions).
        lengths: tokens of each row, each at least 1.
        first_needed: the first position of each row whose output is asked for; it and what is
            behind it are not shared.
        share: compute what rows begin with in common once, where that saves enough.
        owners: the adapter of each row, where they differ: the tokens of neighbouring rows with one
            adapter stand together, and only they share what they begin with.

    Returns:
        The packing, and (num_tokens,) int64, indices into the flattened `input_ids`.
    """
    ids = input_ids.tolist() if share else []
    limits = [min(first, n - 1) for first, n in zip(first_needed, lengths, strict=True)]
    segments: list[tuple[int, int, int, int]] = []
    spans: list[tuple[str, int, int]] = []
    start = 0
    for owner, same in groupby(enumerate(owners or [None] * len(lengths)), key=itemgetter(1)):
        rows = [row for row, _ in same]
        own = _segments(_Tree(ids, limits), rows, lengths, share=share)
        # Parents are counted from the first segment of all.
        before = len(segments)
        segments += [
            (row, begin, end, parent if parent < 0 else parent + before)
            for row, begin, end, parent in own
        ]
        stop = start + sum(end - begin for _, begin, end, _ in own)
        if isinstance(owner, str):
            spans.append((owner, start, stop))
        start = stop
    packing = Packing(
        tuple(end - begin for _, begin, end, _ in segments),
        tuple(parent for *_, parent in segments),
        input_ids.device,
        tuple(spans),
    )
    width = input_ids.shape[1]
    source = torch.cat(
        [torch.arange(row * width + begin, row * width + end) for row, begin, end, _ in segments]
    )
    return packing, source.to(input_ids.device)


def _segments(
    tree: _Tree, rows: Sequence[int], lengths: Sequence[int], *, share: bool
) -> list[tuple[int, int, int, int]]:
    """What these rows share, as the tree has it, and behind it what each has for itself."""
    if share:
        tree.grow(rows, 0, 0, -1)
    rests = [(row, tree.ends[row], lengths[row], tree.leaves[row]) for row in rows]
    return [*tree.segments, *rests]


# The fewest tokens that a segment of its own must save: what the operations on its blocks cost is
# some two tokens of a model of 135M parameters, less than one of a larger model.
_LEAST_SAVED = 4


@dataclass
class _Tree:
    """The segments that rows have in common.

    Attributes:
        ids: the tokens of each row.
        limits: how many of them may be shared.
        segments: grown so far: a row that has it, its begin and end there, and its parent or -1.
        leaves: the last segment of each row.
        ends: and where it ends.
    """

    ids: list[list[int]]
    limits: list[int]
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    leaves: list[int] = field(init=False)
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [-1] * len(self.limits)
        self.ends = [0] * len(self.limits)

    def grow(self, rows: Sequence[int], begin: int, depth: int, parent: int) -> None:
        """Find segments of rows that are the same up to `depth`, behind `parent` up to `begin`."""
        families: dict[int, list[int]] = {}
        for row in rows:
            if depth < self.limits[row]:
                families.setdefault(self.ids[row][depth], []).append(row)
        for family in families.values():
            if len(family) < 2:
                continue
            end = self._common(family, depth)
            if (len(family) - 1) * (end - begin) < _LEAST_SAVED:
                self.grow(family, begin, end, parent)
                continue
            self.segments.append((family[0], begin, end, parent))
            own = len(self.segments) - 1
            for row in family:
                self.leaves[row], self.ends[row] = own, end
            self.grow(family, end, end, own)

    def _common(self, rows: Sequence[int], depth: int) -> int:
        """Up to where rows are the same that are so up to `depth`."""
        limit = min(self.limits[row] for row in rows)
        first = self.ids[rows[0]]
        while depth < limit and all(self.ids[row][depth] == first[depth] for row in rows):
            depth += 1
        return depth
