"""Special positions in the input of a model, or in the input of every block (Hu et al. 2021, 5.1).

A hook in front of the model's backbone puts the special positions among the tokens, a hook behind
it hands back the outputs at the caller's tokens alone. So the head, the loss, the metrics and the
generation loop see the shapes they would see without them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lorakit.errors import DataError, StateError
from lorakit.layers.placement import (
    Placement,
    Shape,
    end_of_tokens,
    ends_of_prompts,
    place,
)

IGNORED = -100

_PLACEMENT = "_lorakit_placement"
# Inputs with a value per token that are moved along.
_MOVED = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model counts positions.

    Attributes:
        given: the backbone takes `position_ids`; else it derives them from the mask.
        offset: the number of the first position (RoBERTa starts behind its padding index).
        limit: how many positions a learned table has, or None where there is no such table.
    """

    given: bool
    offset: int
    limit: int | None


class PrefixTokens(nn.Module):
    """The learned special positions of one model, and what puts them there.

    Attributes:
        enabled: whether the special positions are there.
        placement: where they are in the batch that went forward last, None in a step that only
            adds tokens to a cache.
        ends: (batch,) the column behind each row's prompt, None: behind its last token.

    Args:
        shape: how many, and of what kind the model is.
        positions: how the model counts positions.
        size: (d,) for embeddings, (L, d) for the input of each of L blocks.
        device: where the parameters live.
        dtype: of the parameters.
    """

    def __init__(
        self,
        shape: Shape,
        positions: Positions,
        *,
        size: tuple[int] | tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.positions = positions
        self.in_every_layer = len(size) == 2
        self.enabled = True
        self.placement: Placement | None = None
        self.ends: Tensor | None = None
        self._prompt_width: int | None = None
        for name, count in (("prefix", shape.num_prefix), ("infix", shape.num_infix)):
            # An optimizer and a file have no use for an empty tensor.
            values = torch.empty((*size[:-1], count, size[-1]), device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values) if count else None)

    def learned(self) -> dict[str, Tensor]:
        """`prefix` and `infix`, (l, d) or (L, l, d), where there are any."""
        return dict(self.named_parameters(recurse=False))

    def values(self, layer: int | None = None) -> Tensor:
        """The special positions' embeddings, or their input to one block: (n, d)."""
        found = self.learned().values()
        return torch.cat([p if layer is None else p[layer] for p in found])

    def fill(self, values: Tensor) -> None:
        """Set the values, (n, d) or (L, n, d), prefix first; mutates the parameters."""
        sizes = [p.shape[-2] for p in self.learned().values()]
        with torch.no_grad():
            for mine, new in zip(self.learned().values(), values.split(sizes, -2), strict=True):
                mine.copy_(new)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """No special positions inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def prompts_end(self, ends: Tensor | None) -> Iterator[None]:
        """Inside the block each row's prompt ends in front of this column, (batch,) int64."""
        before, self.ends = self.ends, ends
        try:
            yield
        finally:
            self.ends = before

    @contextmanager
    def prompt_width(self, width: int) -> Iterator[None]:
        """Inside the block every row's prompt lies in the first `width` columns."""
        before, self._prompt_width = self._prompt_width, width
        try:
            yield
        finally:
            self._prompt_width = before

    def enter(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: Inputs
    ) -> tuple[tuple[Any, ...], Inputs] | None:
        """Forward pre-hook of the backbone: tokens become embeddings with special positions.

        With a cache that was filled this way before, only the mask and the positions of the new
        tokens change: the special positions are in the cache.

        Raises:
            StateError: inputs whose meaning with special positions is not defined.
            DataError: more positions than the model has.
        """
        self.placement = None
        if not self.enabled:
            return None
        names = inspect.signature(backbone.forward).parameters
        given: Inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if isinstance(cache, Cache) and int(cache.get_seq_length()):
            return (), self._continue(given, cache)
        return (), self._begin(backbone, given)

    def leave(self, _backbone: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the backbone: outputs at the caller's tokens alone."""
        if self.placement is None or not self.enabled:
            return None
        if isinstance(output, dict):
            for name, value in list(output.items()):
                output[name] = _seen(value, self.placement)
            return output
        return _seen(output, self.placement)

    def _begin(self, backbone: nn.Module, given: Inputs) -> Inputs:
        tokens = given.get("inputs_embeds")
        if tokens is None:
            tokens = _embed(backbone, given.get("input_ids"))
        mask = given.get("attention_mask")
        _require_flat(mask, tokens.shape[:2], given)
        real = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask
        _require_plain_positions(given.get("position_ids"), real, self.positions.offset)
        placement = place(real, self._prompt_ends(real), self.shape, unpadded=mask is None)
        special = (
            tokens.new_zeros((self.shape.num_special, tokens.shape[2]))
            if self.in_every_layer
            else self.values()
        )
        changed: Inputs = {
            "input_ids": None,
            "inputs_embeds": placement.spread(tokens, special.expand(len(tokens), -1, -1)),
        }
        types = given.get("token_type_ids")
        if types is not None:
            types = types.expand(tokens.shape[:2])
            changed["token_type_ids"] = placement.spread(
                types, types.gather(1, placement.neighbours)
            )
        if mask is not None:
            changed["attention_mask"] = placement.mask
        self.placement = placement
        shown = None if mask is None else placement.mask
        return {**given, **changed, **self._position_ids(shown, placement.width, 0)}

    def _continue(self, given: Inputs, cache: Cache) -> Inputs:
        placement = cache.__dict__.get(_PLACEMENT)
        if not isinstance(placement, Placement):
            raise StateError(
                "the cache was filled without the special positions",
                expected="a cache that this model filled, with the same method attached",
                remedy="start with an empty cache",
            )
        given = dict(given)
        new = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        past = int(cache.get_seq_length())
        width = past + new.shape[1]
        mask = given.get("attention_mask")
        if mask is None and placement.unpadded:
            return {**given, **self._position_ids(None, width, past)}
        if mask is None:
            tail = placement.mask.new_ones((len(new), width - placement.width))
        else:
            _require_flat(mask, (len(new), width - self.shape.num_special), given)
            tail = mask[:, placement.num_tokens :]
        given["attention_mask"] = torch.cat([placement.mask.to(tail), tail], dim=1)
        return {**given, **self._position_ids(given["attention_mask"], width, past)}

    def _prompt_ends(self, real: Tensor) -> Tensor | None:
        if self._prompt_width is None:
            return self.ends
        if real.shape[1] < self._prompt_width:
            raise StateError(
                "the prompt comes in parts, and the infix belongs behind its last one",
                where="generate, prefill_chunk_size",
                remedy="remove prefill_chunk_size",
            )
        return end_of_tokens(real[:, : self._prompt_width] != 0)

    def _position_ids(self, mask: Tensor | None, width: int, past: int) -> Inputs:
        """Each row counts its own tokens and special positions, padding left out."""
        if mask is None:
            device = next(iter(self.learned().values())).device
            ids = torch.arange(past, width, device=device)[None]
        else:
            ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        limit = self.positions.limit
        # The largest position is looked at only where the padded width does not settle it.
        if limit is not None and width > limit and int(ids.max()) >= limit:
            raise DataError(
                "a row and the special positions do not fit into the model's context",
                expected=f"at most {limit:,} positions",
                found=f"{int(ids.max()) + 1:,}, {self.shape.num_special} of them special",
                remedy="shorten the row, or take fewer prefix and infix positions",
            )
        return {"position_ids": ids + self.positions.offset} if self.positions.given else {}


@dataclass(frozen=True)
class LayerInput:
    """Puts learned activations at the special positions of one block's input."""

    tokens: PrefixTokens
    layer: int

    def before(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: Inputs
    ) -> tuple[tuple[Any, ...], Inputs] | None:
        """Forward pre-hook of the block."""
        if args:
            return (self._replaced(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._replaced(kwargs["hidden_states"])}

    def after(self, _embeddings: nn.Module, _args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        """Forward hook of what computes the first block's input."""
        return self._replaced(hidden)

    def _replaced(self, hidden: Tensor) -> Tensor:
        placement = self.tokens.placement
        if placement is None or not self.tokens.enabled:
            return hidden
        if hidden.shape[:2] != placement.mask.shape:
            raise StateError(
                "a block is recomputed for another batch than the last one that went forward",
                where=f"block {self.layer}",
                expected=f"{tuple(placement.mask.shape)} positions",
                found=f"{tuple(hidden.shape[:2])}",
                remedy="go backward before the next batch goes forward",
            )
        values = self.tokens.values(self.layer)
        return placement.replace(hidden, values.expand(len(hidden), -1, -1))


def find_prefix(model: nn.Module) -> PrefixTokens | None:
    """The special positions that are attached to the model, or None."""
    return next((m for m in model.children() if isinstance(m, PrefixTokens)), None)


def num_special_positions(model: nn.Module) -> int:
    """Positions of the model's context that are taken before the first token; 0 when disabled."""
    tokens = find_prefix(model)
    return tokens.shape.num_special if tokens is not None and tokens.enabled else 0


@contextmanager
def prompts_before(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Inside the block the prompt of each row ends in front of its first label.

    A model whose loss is computed elsewhere never sees the labels, and an infix has to know.
    Nothing happens where no special positions are attached.

    Args:
        model: any model.
        labels: (batch, positions) int64, -100 where nothing is learned.
    """
    tokens = find_prefix(model)
    if tokens is None:
        yield
        return
    with tokens.prompts_end(ends_of_prompts(labels, IGNORED)):
        yield


def _embed(backbone: nn.Module, input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        raise StateError("the model was called without tokens", expected="input_ids")
    return backbone.get_input_embeddings()(input_ids)  # pyright: ignore[reportCallIssue]


def _require_flat(mask: Tensor | None, expected: tuple[int, ...], given: Inputs) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(expected)):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise StateError(
            "special positions need to know where each row's padding is",
            where="attention_mask",
            expected=f"one value per token, {tuple(expected)}",
            found=str(found),
            remedy="give a mask of one value per token, and leave cache_implementation at its "
            "default",
        )
    strange = [
        name
        for name, value in given.items()
        if isinstance(value, Tensor) and name not in _MOVED and value.shape[:2] == tuple(expected)
    ]
    if strange:
        raise StateError(
            "an input with a value per token has no defined value at special positions",
            where=", ".join(strange),
            remedy="call the model without it",
        )


def _require_plain_positions(positions: Tensor | None, real: Tensor, offset: int) -> None:
    if positions is None:
        return
    counted = (real != 0).long().cumsum(1) - 1 + offset
    columns = torch.arange(real.shape[1], device=real.device).expand_as(counted) + offset
    # Counted from the row's first token, or from the first column as encoders do.
    for plain in (counted, columns):
        if bool(((positions == plain) | (real == 0)).all()):
            return
    raise StateError(
        "the caller numbers the positions otherwise than one by one",
        where="position_ids",
        expected="0, 1, 2, ... in every row",
        remedy="call the model without position_ids; rows packed behind each other are not "
        "possible with special positions",
    )


def _seen(value: Any, placement: Placement) -> Any:
    """An output as the caller sees it; a cache remembers where its special positions are."""
    if isinstance(value, Cache):
        value.__dict__[_PLACEMENT] = placement
    elif isinstance(value, tuple):
        return tuple(_seen(part, placement) for part in value)
    elif isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == placement.width:
        return placement.collect(value)
    return value
