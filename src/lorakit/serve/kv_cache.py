"""Keys and values of the rows that are under way, each at its own length, like lengths together.

A bucket holds rows of up to C tokens, C a power of two, in one tensor per layer with one place per
row; the rows that are being answered are always the first places, so that attention reads them
without a copy. A row that outgrows its bucket moves to the next. A prompt that is being read has
tensors of its own until it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALLEST_BUCKET = 64


def bucket_size(num_tokens: int) -> int:
    """The capacity of the bucket for a row of this many tokens: a power of two."""
    return max(SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())


@dataclass
class PromptCache:
    """Keys and values of one prompt that is being read.

    Attributes:
        capacity: the most tokens it can hold.
        length: tokens read before this forward pass.
        keys: layer -> (key/value heads, capacity, width).
        values: likewise.
    """

    capacity: int
    length: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    values: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (heads, tokens, width) behind what is there, and return all of it so far."""
        if layer not in self.keys:
            heads, _, width = key.shape
            self.keys[layer] = key.new_zeros((heads, self.capacity, width))
            self.values[layer] = value.new_zeros((heads, self.capacity, value.shape[-1]))
        stop = self.length + key.shape[1]
        self.keys[layer][:, self.length : stop] = key
        self.values[layer][:, self.length : stop] = value
        return self.keys[layer][:, :stop], self.values[layer][:, :stop]


class Bucket:
    """Rows of up to `capacity` tokens.

    Attributes:
        rows: the row at each place.
        lengths: the tokens each row holds.
        keys: layer -> (places, key/value heads, capacity, width).
        values: likewise.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[str] = []
        self.lengths: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def insert(self, row: str, source: PromptCache) -> None:
        """Take a row in: the first `source.length` tokens of its keys and values are copied."""
        place, n = len(self.rows), source.length
        self._make_room(place + 1, source)
        for own, given in ((self.keys, source.keys), (self.values, source.values)):
            for layer, tensor in given.items():
                own[layer][place, :, :n] = tensor[:, :n]
        self.rows.append(row)
        self.lengths.append(n)

    def remove(self, row: str) -> None:
        """Let a row go; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            n = self.lengths[last]
            for tensors in (self.keys, self.values):
                for tensor in tensors.values():
                    tensor[place, :, :n] = tensor[last, :, :n]
        self.rows[place], self.lengths[place] = self.rows[last], self.lengths[last]
        self.rows.pop()
        self.lengths.pop()

    def view(self, row: str) -> PromptCache:
        """One row's keys and values, not copied."""
        place = self.rows.index(row)
        return PromptCache(
            self.capacity,
            self.lengths[place],
            {layer: tensor[place] for layer, tensor in self.keys.items()},
            {layer: tensor[place] for layer, tensor in self.values.items()},
        )

    def _make_room(self, num_rows: int, like: PromptCache) -> None:
        places = next(iter(self.keys.values())).shape[0] if self.keys else 0
        if places >= num_rows:
            return
        # Whole doublings: every growth copies what is there.
        places = 1 << (num_rows - 1).bit_length()
        for own, given in ((self.keys, like.keys), (self.values, like.values)):
            for layer, tensor in given.items():
                heads, _, width = tensor.shape
                grown = tensor.new_zeros((places, heads, self.capacity, width))
                if layer in own:
                    grown[: len(self.rows)] = own[layer][: len(self.rows)]
                own[layer] = grown


class RowCache:
    """The buckets, and which row is in which."""

    def __init__(self) -> None:
        self.buckets: dict[int, Bucket] = {}
        self._bucket_of: dict[str, Bucket] = {}

    def insert(self, row: str, prompt: PromptCache) -> None:
        """Take in a row whose prompt was read."""
        bucket = self._bucket(bucket_size(prompt.length + 1))
        bucket.insert(row, prompt)
        self._bucket_of[row] = bucket

    def remove(self, row: str) -> None:
        """Let a row go; an empty bucket gives its memory back."""
        bucket = self._bucket_of.pop(row)
        bucket.remove(row)
        if not bucket.rows:
            del self.buckets[bucket.capacity]

    def make_room(self) -> None:
        """Move the rows whose next token does not fit into their bucket."""
        for bucket in list(self.buckets.values()):
            held = zip(bucket.rows, bucket.lengths, strict=True)
            for row in [row for row, length in held if length >= bucket.capacity]:
                moved = bucket.view(row)
                self._bucket(2 * bucket.capacity).insert(row, moved)
                self.remove(row)
                self._bucket_of[row] = self.buckets[2 * bucket.capacity]

    def advance(self, rows: Iterable[str]) -> None:
        """Count the token that a forward pass wrote for each of these rows."""
        for row in rows:
            bucket = self._bucket_of[row]
            bucket.lengths[bucket.rows.index(row)] += 1

    def clear(self) -> None:
        """Let everything go."""
        self.buckets, self._bucket_of = {}, {}

    def num_tokens(self) -> int:
        """Tokens held."""
        return sum(sum(bucket.lengths) for bucket in self.buckets.values())

    def __contains__(self, row: object) -> bool:
        return row in self._bucket_of

    def length(self, row: str) -> int:
        """Tokens that one row holds."""
        bucket = self._bucket_of[row]
        return bucket.lengths[bucket.rows.index(row)]

    def _bucket(self, capacity: int) -> Bucket:
        return self.buckets.setdefault(capacity, Bucket(capacity))


def window_mask(queries: Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where a key may be seen, minus infinity elsewhere.

    Args:
        queries: (...,) the position of each query in its row; key j has position j.
        num_keys: how many keys there are.
        window: keys further back than this many positions (the query's own included) are not seen.
        dtype: of the result.

    Returns:
        (..., num_keys).
    """
    keys = torch.arange(num_keys, device=queries.device)
    hidden = keys > queries[..., None]
    if window is not None:
        hidden |= keys <= queries[..., None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=queries.device)
    return mask.masked_fill_(hidden, float("-inf"))
