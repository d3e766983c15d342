"""Which adapter runs: one for the whole batch, none, or one per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from threading import get_ident
from typing import Protocol

import torch
from torch import Tensor

from lorakit.errors import StateError

Selection = str | None | tuple[str | None, ...]
# An adapter's name, and its stretch of the tokens of a packed batch.
TokenSpans = tuple[tuple[str, int, int], ...]


@dataclass
class Routing:
    """The selection shared by all adapted layers of one model.

    `active` is an adapter's name, None for the base, or one of those per batch row.
    """

    active: Selection = None
    merged: list[str] = field(default_factory=list[str])
    # By thread: rows of one batch may run in several, each with a part of them. None: any thread,
    # because a checkpoint is computed again in a thread of the device's.
    _spans: dict[int | None, TokenSpans | None] = field(
        default_factory=dict[int | None, TokenSpans | None], init=False
    )

    @property
    def spans(self) -> TokenSpans | None:
        """The stretches of the packed batch that runs in this thread; None: it is not packed."""
        if not self._spans:  # also what torch.compile traces: it cannot ask for the thread
            return None
        return self._spans.get(get_ident(), self._spans.get(None))

    def lay_out(self, spans: TokenSpans | None) -> None:
        """State how the batch that comes next in this thread is packed, until another selection."""
        self._spans[get_ident()] = self._spans[None] = spans

    def select(self, selection: Selection) -> None:
        """Change the selection in place.

        Raises:
            StateError: a merged adapter cannot be taken out of the batch.
        """
        for name in self.merged:
            if (set(selection) if isinstance(selection, tuple) else {selection}) != {name}:
                raise StateError(
                    f"adapter {name!r} is merged into the weights, so it runs for every row",
                    expected=f"use(model, {name!r})",
                    found=f"use(model, {selection!r})",
                    remedy="call unmerge(model) first",
                )
        self.resume(selection)

    def resume(self, selection: Selection) -> None:
        """Put back what was selected before, whatever is merged by now."""
        self.active = selection
        self._spans.clear()


def row_groups(rows: Sequence[str | None], batch: int, where: str) -> dict[str, Tensor]:
    """The batch indices that each named adapter owns.

    A batch may hold several consecutive entries per row (beams, returned sequences, a flattened
    sequence axis); row i then owns the i-th block.

    Args:
        rows: one adapter name or None per row.
        batch: the size of the tensor's first axis.
        where: the site, for the error.

    Returns:
        name -> int64 indices into the first axis, ascending.

    Raises:
        StateError: the batch is not a multiple of the number of rows.
    """
    block = _block(rows, batch, where)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        if name is not None:
            groups.setdefault(name, []).extend(range(i * block, (i + 1) * block))
    return {name: torch.tensor(indices) for name, indices in groups.items()}


def row_spans(rows: Sequence[str | None], batch: int, where: str) -> list[tuple[str, int, int]]:
    """The stretches of the batch that one named adapter owns, as `row_groups` counts them.

    Returns:
        (name, first index of the first axis, the one behind the last), ascending.

    Raises:
        StateError: the batch is not a multiple of the number of rows.
    """
    block = _block(rows, batch, where)
    spans: list[tuple[str, int, int]] = []
    start = 0
    for name, run in groupby(rows):
        stop = start + block * len(list(run))
        if name is not None:
            spans.append((name, start, stop))
        start = stop
    return spans


def _block(rows: Sequence[str | None], batch: int, where: str) -> int:
    """Entries of the first axis per row."""
    if batch % len(rows):
        raise StateError(
            "the batch does not have one adapter per row",
            where=where,
            expected=f"a first axis that is a multiple of {len(rows)}",
            found=str(batch),
            remedy="name one adapter (or None) per row of the batch",
        )
    return batch // len(rows)


class RowSegment(Protocol):
    """What is added for rows that stand next to each other."""

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add to the base's output y of layer `name`, in place.

        Args:
            name: the layer.
            x: (rows, positions, in), or token ids (rows, positions).
            y: (rows, positions, out).
        """
        ...


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """The entries `start` to `stop` of the batch, and what is added for them."""

    start: int
    stop: int
    segment: RowSegment


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """Which factors belong to which entries of a batch that is served.

    A batch is `len(order)` rows of the same number of positions, and behind them, in a packed batch
    of one axis, segments of other lengths (the prompts that are being read).

    Attributes:
        order: the rows' ids, in the order they must stand in.
        groups: stretches of those rows.
        segments: stretches behind the rows, in entries of the packed axis.
        num_entries: entries of the packed axis, or None where the batch has rows alone.
    """

    order: tuple[str, ...] = ()
    groups: tuple[GroupedRows, ...] = ()
    segments: tuple[GroupedRows, ...] = ()
    num_entries: int | None = None

    @property
    def empty(self) -> bool:
        """Whether every row runs on the base alone."""
        return not self.groups and not self.segments

    def add(self, name: str, x: Tensor, y: Tensor, *, ids: bool) -> Tensor:
        """The base's output with each row's change added, in place where its layout allows.

        Args:
            name: the layer.
            x: its input, any leading axes that hold the entries in order.
            y: the base's output for it.
            ids: x holds token ids.

        Raises:
            StateError: the layer was not given the batch's entries in their order.
        """
        y = y.contiguous()
        flat_y = y.view(-1, y.shape[-1])
        flat_x = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])
        each = self._positions(flat_x.shape[0], name)
        for part in self.groups:
            n, start, stop = part.stop - part.start, part.start * each, part.stop * each
            # Nearly always one group is the whole batch: nothing to cut out, at every layer.
            whole = start == 0 and stop == flat_x.shape[0]
            its_x = flat_x if whole else flat_x[start:stop]
            its_y = flat_y if whole else flat_y[start:stop]
            shape = (n, each)
            part.segment.add(
                name, its_x.view(shape if ids else (*shape, -1)), its_y.view(*shape, -1)
            )
        for part in self.segments:
            entries = slice(part.start, part.stop)
            part.segment.add(name, flat_x[entries][None], flat_y[entries][None])
        return y

    def _positions(self, num_entries: int, name: str) -> int:
        """Positions per row."""
        packed = self.num_entries is not None
        if packed and num_entries == self.num_entries:
            return 1
        if not packed and self.order and num_entries % len(self.order) == 0:
            return num_entries // len(self.order)
        raise StateError(
            "the layer does not see the batch's rows in their order",
            where=name,
            expected=f"{self.num_entries} entries"
            if packed
            else f"a multiple of {len(self.order)} entries",
            found=str(num_entries),
            remedy="leave the layers of mixture-of-experts blocks out of an adapter's targets",
        )
