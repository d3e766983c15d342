"""Rows of a batch laid out one behind the other, with the start that they share once.

A batch of rows padded to the longest spends a product on every padded position, and rows that are
written with one template begin with the same tokens, which a causal model turns into the same
states in every row. Packed, a batch is one row of real tokens: the shared start, then what is left
of each row. Only attention has to know which keys belong to a token:

    shared start:       causal on itself
    rest of each row:   all of the shared start, and causal on its own row

The gradients of the shared start add up over the rows, as they do when it is computed in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each row are in a packed batch.

    Attributes:
        shared: tokens of the shared start, 0 for none.
        lengths: tokens of the rest of each row, each at least 1.
        device: where the packed batch is.
    """

    shared: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed batch."""
        return self.shared + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Positions of the longest row, its shared start included."""
        return self.shared + max(self.lengths)

    @cached_property
    def slots(self) -> Tensor:
        """(rows, M) int64: the packed place of each position of the rests, M the longest rest.

        Positions behind a row's end point at the row's last token.
        """
        lengths = torch.tensor(self.lengths, device=self.device)
        starts = self.shared + lengths.cumsum(0) - lengths
        places = torch.arange(max(self.lengths), device=self.device)
        return starts[:, None] + torch.minimum(places[None], lengths[:, None] - 1)

    @cached_property
    def real(self) -> Tensor:
        """The places of the real tokens among all rows x M slots, in packed order, int64."""
        width = max(self.lengths)
        lengths = torch.tensor(self.lengths, device=self.device)
        mask = torch.arange(width, device=self.device)[None] < lengths[:, None]
        return mask.flatten().nonzero()[:, 0]

    @cached_property
    def positions(self) -> Tensor:
        """(num_tokens,) int64: the place of each token in its own row."""
        rows = [torch.arange(self.shared, self.shared + n) for n in self.lengths]
        return torch.cat([torch.arange(self.shared), *rows]).to(self.device)

    def blocks(self) -> list[Block]:
        """The shared start, if there is one, and the rests."""
        rests = Block(self.shared, len(self.lengths), max(self.lengths), self)
        return [Block(0, 1, self.shared, None), rests] if self.shared else [rests]


@dataclass(frozen=True)
class Block:
    """Queries that see the same kind of keys: `before` shared ones, and their own row up to them.

    Attributes:
        before: keys of the shared start in front of every row.
        rows: how many rows.
        width: queries of the longest row.
        packing: where the rows are; None: one row at the very start.
    """

    before: int
    rows: int
    width: int
    packing: Packing | None

    def spread(self, packed: Tensor, *, zero_behind: bool = False) -> Tensor:
        """(num_tokens, ...) to (rows, width, ...).

        Args:
            packed: values of all tokens.
            zero_behind: fill what is behind the end of a row with zeros, as gradients need it, and
                not with the row's last value.
        """
        if self.packing is None:
            return packed[None, : self.width]
        if zero_behind:
            filled = packed.new_zeros((self.rows * self.width, *packed.shape[1:]))
            filled.index_copy_(0, self.packing.real, packed[self.packing.shared :])
        else:
            filled = packed[self.packing.slots.flatten()]
        return filled.unflatten(0, (self.rows, self.width))

    def place(self, values: Tensor, packed: Tensor) -> None:
        """Write (rows, width, ...) where it belongs in (num_tokens, ...); mutates `packed`."""
        if self.packing is None:
            packed[: self.width] = values[0]
        else:
            torch.index_select(
                values.flatten(0, 1), 0, self.packing.real, out=packed[self.packing.shared :]
            )

    def keys(self, packed: Tensor) -> Tensor:
        """(num_tokens, groups, d) to (rows * groups, before + width, d)."""
        own = self.spread(packed).transpose(1, 2)
        groups, width = own.shape[1], own.shape[-1]
        if self.before:
            shared = packed[: self.before].transpose(0, 1)[None].expand(self.rows, -1, -1, -1)
            own = torch.cat([shared, own], dim=2)
        return own.reshape(self.rows * groups, self.before + self.width, width)

    def place_keys(self, values: Tensor, packed: Tensor) -> None:
        """The gradient of `keys`, written or, on the shared start, added; mutates `packed`.

        Args:
            values: (rows * groups, before + width, d); zero behind the end of a row.
            packed: (num_tokens, groups, d).
        """
        per_row = values.unflatten(0, (self.rows, -1))
        self.place(per_row[:, :, self.before :].transpose(1, 2), packed)
        if self.before:
            packed[: self.before] += per_row[:, :, : self.before].sum(0).transpose(0, 1)

    def queries(self, packed: Tensor, groups: int, *, zero_behind: bool = False) -> Tensor:
        """(num_tokens, heads, d) to (rows * groups, heads / groups * width, d)."""
        spread = self.spread(packed, zero_behind=zero_behind)
        spread = spread.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        return spread.reshape(self.rows * groups, -1, packed.shape[-1])

    def place_queries(self, values: Tensor, packed: Tensor) -> None:
        """The inverse of `queries`; mutates `packed`."""
        groups = values.shape[0] // self.rows
        per_head = values.view(self.rows, groups, -1, self.width, values.shape[-1])
        spread = per_head.permute(0, 3, 1, 2, 4).flatten(2, 3)
        self.place(spread, packed)

    def hide(self, scores: Tensor) -> None:
        """Take keys behind the query out of scores (rows * groups, heads * width, keys), in place.

        Keys behind the end of a row are behind all of its queries.
        """
        ones = torch.ones(self.width, self.width, dtype=torch.bool, device=scores.device)
        later = ones.triu_(1)
        own = scores.view(scores.shape[0], -1, self.width, scores.shape[-1])[..., self.before :]
        own.masked_fill_(later, torch.finfo(scores.dtype).min)


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
    for block in packing.blocks():
        queries = block.queries(query, groups)
        scores = (queries * scale) @ block.keys(key).transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        block.hide(scores)
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        mixed = weights @ block.keys(value)
        per_head = mixed.view(block.rows, groups, -1, block.width, mixed.shape[-1])
        rows = per_head.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        found.append(rows if block.packing is None else rows[block.packing.real])
    return torch.cat(found)


def pack_rows(
    input_ids: Tensor, lengths: Sequence[int], first_needed: Sequence[int], *, share: bool
) -> tuple[Packing, Tensor]:
    """The packing of rows padded on the right, and their tokens, (num_tokens,) int64.

    Args:
        input_ids: (rows, positions).
        lengths: tokens of each row, each at least 1.
        first_needed: the first position of each row whose output is asked for; it and what is
            behind it are not shared.
        share: compute the start that all rows have in common once.
    """
    shared = 0
    if share and len(lengths) > 1:
        limit = min(*first_needed, *(n - 1 for n in lengths))
        same = (input_ids[:, :limit] == input_ids[:1, :limit]).all(0)
        shared = int(same.long().cumprod(0).sum())
    packing = Packing(shared, tuple(n - shared for n in lengths), input_ids.device)
    rests = [row[shared:n] for row, n in zip(input_ids, lengths, strict=True)]
    return packing, torch.cat([input_ids[0, :shared], *rests])
