"""One forward pass over many rows without padding: all tokens on one axis, each row's own cache.

The rows that are being answered come first, one token each; behind them stand pieces of prompts.
Linear layers see one long row; attention, which transformers looks up by name, is ours and reads
each row's keys from where the cache has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorakit.errors import ServeError
from lorakit.serve.kv_cache import Bucket, PromptCache, RowCache, window_mask

ATTENTION = "lorakit_packed"
# What the model hands down to every layer, and means nothing to attention.
_KNOWN = frozenset(
    {
        "position_ids",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "cache_position",
    }
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of a prompt, and the cache they go into."""

    ids: Sequence[int]
    cache: PromptCache


@dataclass(frozen=True, slots=True)
class _BucketRows:
    """The rows of one bucket in this pass.

    Attributes:
        bucket: where their keys are.
        entries: (rows,) their entries on the packed axis, or None when they are the first ones in
            this very order.
        places: (rows,) 0, 1, 2, ...: their places in the bucket.
        positions: (rows,) the position of each row's new token.
        longest: keys of the longest row, the new one included.
    """

    bucket: Bucket
    entries: Tensor | None
    places: Tensor
    positions: Tensor
    longest: int


@dataclass
class PackedStep:
    """Everything attention needs of one forward pass.

    Args:
        cache: the rows that are being answered.
        order: their ids, in the order of their tokens on the packed axis.
        pieces: what is read of prompts, behind them.
        device: the model's.
    """

    cache: RowCache
    order: tuple[str, ...]
    pieces: Sequence[Piece]
    device: torch.device
    _rows: list[_BucketRows] = field(init=False)
    _masks: dict[tuple[object, ...], Tensor] = field(
        init=False, default_factory=dict[tuple[object, ...], Tensor]
    )

    def __post_init__(self) -> None:
        place = {row: i for i, row in enumerate(self.order)}
        self._rows = []
        for bucket in self.cache.buckets.values():
            entries = [place[row] for row in bucket.rows]
            in_order = entries == list(range(len(self.order)))
            self._rows.append(
                _BucketRows(
                    bucket=bucket,
                    entries=None if in_order else torch.tensor(entries, device=self.device),
                    places=torch.arange(len(entries), device=self.device),
                    positions=torch.tensor(bucket.lengths, device=self.device),
                    longest=max(bucket.lengths) + 1,
                )
            )

    def positions(self) -> Tensor:
        """(1, entries): the position of every token in its row."""
        numbers = [self.cache.length(row) for row in self.order]
        for piece in self.pieces:
            numbers += range(piece.cache.length, piece.cache.length + len(piece.ids))
        return torch.tensor(numbers, device=self.device)[None]

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], how: _Scores) -> Tensor:
        """Write this pass's keys and values, and attend.

        Args:
            layer: the attention layer's number.
            qkv: each (entries, heads, width).
            how: scale, window and cap of the scores.

        Returns:
            (entries, query heads, width of the values).
        """
        query, key, value = qkv
        out = value.new_empty((*query.shape[:2], value.shape[-1]))
        for rows in self._rows:
            self._attend_rows(layer, rows, qkv, how, out)
        start = len(self.order)
        for index, piece in enumerate(self.pieces):
            stop = start + len(piece.ids)
            k, v = piece.cache.append(
                layer, key[start:stop].transpose(0, 1), value[start:stop].transpose(0, 1)
            )
            groups = query.shape[1] // k.shape[0]
            mask = self._prompt_mask(index, how.window, groups, query.dtype)
            out[start:stop] = how.attend_prompt(query[start:stop], k, v, mask)
            start = stop
        return out

    def _attend_rows(
        self,
        layer: int,
        rows: _BucketRows,
        qkv: tuple[Tensor, Tensor, Tensor],
        how: _Scores,
        out: Tensor,
    ) -> None:
        n, longest = len(rows.bucket.rows), rows.longest
        query, key, value = (
            t[:n] if rows.entries is None else t.index_select(0, rows.entries) for t in qkv
        )
        keys, values = rows.bucket.keys[layer], rows.bucket.values[layer]
        keys[rows.places, :, rows.positions] = key
        values[rows.places, :, rows.positions] = value
        mask = self._rows_mask(rows, how.window, query.dtype)
        found = how.attend_rows(query, keys[:n, :, :longest], values[:n, :, :longest], mask)
        if rows.entries is None:
            out[:n] = found
        else:
            out.index_copy_(0, rows.entries, found)

    def _rows_mask(self, rows: _BucketRows, window: int | None, dtype: torch.dtype) -> Tensor:
        slot = ("rows", rows.bucket.capacity, window)
        if slot not in self._masks:
            mask = window_mask(rows.positions, rows.longest, window, dtype)
            self._masks[slot] = mask[:, None, None]
        return self._masks[slot]

    def _prompt_mask(
        self, index: int, window: int | None, groups: int, dtype: torch.dtype
    ) -> Tensor:
        """(groups x tokens, keys): the same for every query head of one key/value head."""
        slot = ("prompt", index, window, groups)
        if slot not in self._masks:
            piece = self.pieces[index]
            stop = piece.cache.length + len(piece.ids)
            queries = torch.arange(piece.cache.length, stop, device=self.device)
            self._masks[slot] = window_mask(queries, stop, window, dtype).repeat(groups, 1)
        return self._masks[slot]


@dataclass(frozen=True, slots=True)
class _Scores:
    """How scores are made: scale * q k, capped, masked.

    Several query heads on one key/value head are queries of that head at the same position, so
    that keys are never repeated.
    """

    scale: float
    window: int | None
    cap: float | None

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One query per row: q (rows, heads, width), k and v (rows, kv heads, keys, width)."""
        rows, heads, width = q.shape
        grouped = q.view(rows, k.shape[1], heads // k.shape[1], width)
        return self._attend(grouped, k, v, mask).reshape(rows, heads, -1)

    def attend_prompt(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One row: q (tokens, heads, width), k and v (kv heads, keys, width)."""
        tokens, heads, width = q.shape
        groups = heads // k.shape[0]
        grouped = q.view(tokens, k.shape[0], groups, width).permute(1, 2, 0, 3)
        flat = grouped.reshape(1, k.shape[0], groups * tokens, width)
        found = self._attend(flat, k[None], v[None], mask)
        shaped = found.view(k.shape[0], groups, tokens, -1)
        return shaped.permute(2, 0, 1, 3).reshape(tokens, heads, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.cap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        scores = self.cap * torch.tanh(q @ k.transpose(-1, -2) * (self.scale / self.cap)) + mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


_step: ContextVar[PackedStep | None] = ContextVar("lorakit_packed_step", default=None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over the packed step that is under way.

    Args:
        module: the attention layer; its `layer_idx` names its cache.
        query: (1, heads, entries, width).
        key: (1, key/value heads, entries, width).
        value: likewise.
        attention_mask: None; what may be seen follows from the step.
        how: scaling, sliding_window, softcap, and what does not matter here.

    Returns:
        (1, entries, heads, width), and no weights.

    Raises:
        ServeError: the layer asks for something that this attention does not do.
    """
    step = _step.get()
    scaling, window, cap = (how.pop(k, None) for k in ("scaling", "sliding_window", "softcap"))
    dropout = how.pop("dropout", 0.0)
    odd = sorted(k for k, v in how.items() if k not in _KNOWN and v is not None)
    layer = getattr(module, "layer_idx", None)
    if step is None or odd or dropout or attention_mask is not None or layer is None:
        raise ServeError(
            "this attention layer cannot run in a packed batch",
            where=type(module).__name__,
            found=", ".join(odd) or "an attention mask, dropout, or no layer_idx",
        )
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = step.attend(layer, (q, k, v), _Scores(float(scale), window, cap))
    return out[None], None


@contextmanager
def packed_mode(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model's attention is ours; afterwards its own again."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
    own = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own or "eager")


def packed_logits(
    model: PreTrainedModel, step: PackedStep, last_ids: Sequence[int], wanted: Sequence[int]
) -> Tensor:
    """Run one step; the caches of the pieces and rows hold the new keys afterwards.

    Args:
        model: inside `packed_mode`.
        step: the rows and pieces.
        last_ids: the newest token of each row in `step.order`.
        wanted: entries of the packed axis whose logits are wanted, at least one.

    Returns:
        (wanted, vocabulary).
    """
    ids = [*last_ids, *(token for piece in step.pieces for token in piece.ids)]
    token = _step.set(step)
    try:
        output = model(
            input_ids=torch.tensor(ids, device=step.device)[None],
            position_ids=step.positions(),
            use_cache=False,
            logits_to_keep=torch.tensor(list(wanted), device=step.device),
        )
    finally:
        _step.reset(token)
    step.cache.advance(step.order)
    for piece in step.pieces:
        piece.cache.length += len(piece.ids)
    return output.logits[0]
