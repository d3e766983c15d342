"""Rows of a batch laid out one behind the other, with the starts that they have in common once.

A batch of rows padded to the longest spends a product on every padded position, and rows that are
written with one template, or answer one prompt, begin with the same tokens, which a causal model
turns into the same states in every row. Packed, a batch is one row of real tokens. It is cut into
segments that form a tree: each row is a path of it, and what rows share is there once. Only
attention has to know which keys belong to a token: all of the segments in front of its own, and its
own up to itself.

The gradients of what is shared add up over the rows, as they do when it is computed in each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.layers.routing import TokenSpans


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each row are in a packed batch: the tree of its segments, in order.

    Attributes:
        lengths: tokens of each segment, each at least 1; behind those that rows share is what each
            row has for itself, in the order of the rows.
        parents: the segment right in front of each one, an earlier one; -1 for the start of a row.
        device: where the packed batch is.
        spans: an adapter's name and its stretch of the tokens, where each row names its own.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    device: torch.device
    spans: TokenSpans = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed batch."""
        return sum(self.lengths)

    @property
    def shared(self) -> int:
        """Tokens of the start that all rows have in common, 0 for none."""
        first, *others = self.lengths
        return first if others and self.parents.count(-1) == 1 else 0

    @property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(first + n for first, n in zip(self._firsts, self.lengths, strict=True))

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """Where each segment begins in the packed batch."""
        return tuple(itertools.accumulate(self.lengths[:-1], initial=0))

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """Where each segment begins in its rows."""
        return tuple(sum(end - begin for begin, end in self._fronts(p)) for p in self.parents)

    def _fronts(self, segment: int) -> tuple[tuple[int, int], ...]:
        """The packed places [begin, end) of what is in front of a segment, in order, and of it."""
        if segment < 0:
            return ()
        begin = self._begins[segment]
        return (*self._fronts(self.parents[segment]), (begin, begin + self.lengths[segment]))

    @cached_property
    def positions(self) -> Tensor:
        """(num_tokens,) int64: the place of each token in its own row."""
        found = [
            torch.arange(first, first + n)
            for first, n in zip(self._firsts, self.lengths, strict=True)
        ]
        return torch.cat(found).to(self.device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every query in exactly one block, whose segments have the same ones in front of them."""
        found: list[Block] = []
        for parent in dict.fromkeys(self.parents):
            every = zip(self.lengths, self._begins, self.parents, strict=True)
            rows = sorted(((n, begin) for n, begin, p in every if p == parent), reverse=True)
            while rows:
                width = rows[0][0]
                count = sum(width**2 - n**2 <= _BLOCK_COST for n, _ in rows)
                found += _blocks(self._fronts(parent), tuple(rows[:count]), self.device)
                rows = rows[count:]
        return tuple(found)


# What the operations on one more block cost, in pairs of a query and a key: found by timing.
_BLOCK_COST = 6000


def _blocks(
    fronts: tuple[tuple[int, int], ...], rows: tuple[tuple[int, int], ...], device: torch.device
) -> list[Block]:
    """Rows (length, start) of about one length, cut where fewer hidden keys pay for one block more.

    In one block, half of the scores are of keys behind their query; in c blocks, 1/c of those.
    """
    width = rows[0][0]
    count = max(1, round(width * math.sqrt(len(rows) / (2 * _BLOCK_COST))))
    edges = [width * i // count for i in range(count + 1)]
    return [
        Block(fronts, tuple((n, start) for n, start in rows if n > first), first, stop, device)
        for first, stop in itertools.pairwise(edges)
    ]


@dataclass(frozen=True)
class Block:
    """Some queries of some rows: those at the places [first, stop) of each row.

    A row is a segment of the packing here. Its queries see what the rows have in front of them, and
    their own row up to themselves.

    Attributes:
        fronts: the packed places [begin, end) of the keys in front of every row, in their order.
        rows: tokens of each row, more than `first`, and where it begins in the packed batch.
        first: the first query of each row.
        stop: behind the last query; queries behind a row's end are its last token over again.
        device: where the packed batch is.
    """

    fronts: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    first: int
    stop: int
    device: torch.device

    @cached_property
    def before(self) -> int:
        """Keys in front of every row."""
        return sum(end - begin for begin, end in self.fronts)

    @property
    def width(self) -> int:
        """Queries of each row."""
        return self.stop - self.first

    @cached_property
    def _is_padded(self) -> bool:
        return any(n < self.stop for n, _ in self.rows)

    @cached_property
    def _real(self) -> Tensor:
        """Which of the rows x width queries are no repetitions, int64."""
        return self._index(
            [
                i * self.width + j
                for i, (n, _) in enumerate(self.rows)
                for j in range(min(n, self.stop) - self.first)
            ]
        )

    @cached_property
    def places(self) -> Tensor:
        """The packed places of the queries without repetitions, int64."""
        return self._index(
            [start + j for n, start in self.rows for j in range(self.first, min(n, self.stop))]
        )

    @cached_property
    def _slots(self) -> Tensor:
        """(rows * stop,) int64: the packed places of all keys of the rows."""
        return self._index(
            [start + min(j, n - 1) for n, start in self.rows for j in range(self.stop)]
        )

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def _own(self, packed: Tensor, first: int) -> Tensor:
        """(num_tokens, ...) to (rows, stop - first, ...): the rows from `first` to `stop`."""
        if len(self.rows) == 1:
            start = self.rows[0][1]
            return packed[None, start + first : start + self.stop]
        spread = packed[self._slots].unflatten(0, (len(self.rows), self.stop))
        return spread[:, first:]

    def keys(self, packed: Tensor) -> Tensor:
        """(num_tokens, groups, d) to (rows * groups, before + stop, d)."""
        own = self._own(packed, 0).transpose(1, 2)
        if self.before:
            shared = torch.cat([packed[begin:end] for begin, end in self.fronts])
            shared = shared.transpose(0, 1)[None]
            own = torch.cat([shared.expand(len(self.rows), -1, -1, -1), own], dim=2)
        return own.reshape(-1, self.before + self.stop, packed.shape[-1])

    def add_keys(self, values: Tensor, packed: Tensor) -> None:
        """Add the gradient of `keys` where it belongs; mutates `packed`.

        Args:
            values: (rows * groups, before + stop, d); zero behind the end of a row.
            packed: (num_tokens, groups, d).
        """
        per_row = values.unflatten(0, (len(self.rows), -1))
        own = per_row[:, :, self.before :].transpose(1, 2)
        if len(self.rows) == 1:
            start = self.rows[0][1]
            packed[start : start + self.stop] += own[0]
        else:
            packed.index_add_(0, self._slots, own.flatten(0, 1).to(packed.dtype))
        if self.before:
            shared = per_row[:, :, : self.before].sum(0).transpose(0, 1)
            sizes = [end - begin for begin, end in self.fronts]
            for (begin, end), part in zip(self.fronts, shared.split(sizes), strict=True):
                packed[begin:end] += part

    def queries(self, packed: Tensor, groups: int, *, zero_behind: bool = False) -> Tensor:
        """(num_tokens, heads, d) to (rows * groups, heads / groups * width, d).

        Args:
            packed: values of all tokens.
            groups: key heads.
            zero_behind: fill what is behind the end of a row with zeros, as gradients need it.
        """
        spread = self._own(packed, self.first)
        if zero_behind and self._is_padded:
            real = spread.flatten(0, 1)[self._real]
            spread = torch.zeros_like(spread, memory_format=torch.contiguous_format)
            spread.flatten(0, 1).index_copy_(0, self._real, real)
        spread = spread.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        return spread.reshape(len(self.rows) * groups, -1, packed.shape[-1])

    def rows_of(self, values: Tensor) -> Tensor:
        """(rows * groups, heads / groups * width, d) to the real queries, (places, heads, d)."""
        groups = values.shape[0] // len(self.rows)
        per_head = values.view(len(self.rows), groups, -1, self.width, values.shape[-1])
        spread = per_head.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        return spread[self._real] if self._is_padded else spread

    def place_queries(self, values: Tensor, packed: Tensor) -> None:
        """The inverse of `queries`; mutates `packed`."""
        if len(self.rows) == 1:
            start = self.rows[0][1]
            packed[start + self.first : start + self.stop] = self.rows_of(values)
        else:
            packed.index_copy_(0, self.places, self.rows_of(values))

    def hide(self, scores: Tensor) -> None:
        """Take keys behind the query out of scores (rows * groups, heads * width, keys), in place.

        Keys behind the end of a row are behind all of its queries.
        """
        ones = torch.ones(self.width, self.width, dtype=torch.bool, device=scores.device)
        own = scores.view(scores.shape[0], -1, self.width, scores.shape[-1])
        own[..., self.before + self.first :].masked_fill_(
            ones.triu_(1), torch.finfo(scores.dtype).min
        )


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(s q k^T + mask) v of a packed batch, of ordinary operations.

    Args:
        query: (num_tokens, heads, d).
        key: (num_tokens, key heads, d); heads is a multiple of key heads.
        value: (num_tokens, key heads, value width).
        packing: which tokens see which.
        scale: s.
        softcap: scores become softcap * tanh(scores / softcap).
        dropout: probability on the attention weights.

    Returns:
        (num_tokens, heads, value width).
    """
    groups = key.shape[1]
    found: list[Tensor] = []
    for block in packing.blocks:
        queries = block.queries(query, groups)
        scores = (queries * scale) @ block.keys(key).transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        block.hide(scores)
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        mixed = weights @ block.keys(value)
        found.append(block.rows_of(mixed))
    order = torch.cat([block.places for block in packing.blocks]).argsort()
    return torch.cat(found)[order]
