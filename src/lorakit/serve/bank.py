"""Factors of the rows of a batch, side by side, so that one product serves all of them.

Rows of similar rank form a group. Each row has a place in its group's stacked tensors, which are
written only when the composition of the batch changes: where the row at a place is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.layers.routing import GroupedRows, RowSegment, TokenRouting
from lorakit.serve.served import ServedAdapter, ServedSite

# A row of rank 64 must not make seven rows of rank 8 pay for it, nor every rank be its own product.
_CLASSES = (16, 64, 256)
_STEP = 8


@dataclass
class _Stack:
    """One layer's factors, one place per row; places beyond the rows of now are stale.

    Attributes:
        A: (places, r, in).
        B: (places, r, out).
        gain: (places, 1, out), or None while no row has one.
        shift: (places, 1, out), likewise.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    shift: Tensor | None

    def first(self, n: int) -> _Live:
        """The factors of the first n places, not copied."""
        return _Live(
            self.A[:n].transpose(1, 2),
            self.B[:n],
            None if self.gain is None else self.gain[:n],
            None if self.shift is None else self.shift[:n],
        )


@dataclass(frozen=True, slots=True)
class _Live:
    """What a pass reads of a stack, made once per composition: A as (rows, in, r)."""

    A: Tensor
    B: Tensor
    gain: Tensor | None
    shift: Tensor | None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Y += each row's change; x (rows, positions, in), y (rows, positions, out)."""
        affine = _affine(y, self.gain, self.shift)
        y.baddbmm_(torch.bmm(x, self.A), self.B)
        if affine is not None:
            y.add_(affine)


def _affine(y: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Gain * y + shift, taken before anything is added to y."""
    if gain is None:
        return shift
    return y * gain if shift is None else torch.addcmul(shift.expand_as(y), y, gain)


class AdapterRows(RowSegment):
    """Rows that share one adapter: no stack is needed."""

    def __init__(self, adapter: ServedAdapter) -> None:
        self.adapter = adapter

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Y += what the adapter changes at layer `name`, in place.

        Args:
            name: the layer.
            x: (rows, positions, in), or token ids (rows, positions).
            y: (rows, positions, out).
        """
        site = self.adapter.sites.get(name)
        if site is None:
            return
        affine = _affine(y, site.gain, site.shift)
        if site.embedding:
            y.add_(F.embedding(x, site.A) @ site.B)
        else:
            flat = y.view(-1, y.shape[-1])
            flat.addmm_(F.linear(x.reshape(-1, x.shape[-1]), site.A), site.B)
        if affine is not None:
            y.add_(affine)


@dataclass
class _Group(RowSegment):
    """Rows of one class of rank, and their factors."""

    rows: list[str] = field(default_factory=list[str])
    adapters: list[ServedAdapter] = field(default_factory=list[ServedAdapter])
    stacks: dict[str, _Stack] = field(default_factory=dict[str, _Stack])
    live: dict[str, _Live] = field(default_factory=dict[str, _Live])
    written: list[ServedAdapter | None] = field(default_factory=list[ServedAdapter | None])

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """See `AdapterRows.add`."""
        live = self.live.get(name)
        if live is not None:
            live.add(x, y)
            return
        for place, adapter in enumerate(self.adapters):
            site = adapter.sites.get(name)
            if site is not None and site.embedding:
                # A look-up reads one row of A; copying whole tables would cost more than a loop.
                part = AdapterRows(adapter)
                part.add(name, x[place : place + 1], y[place : place + 1])

    def seat(self, wanted: dict[str, ServedAdapter]) -> None:
        """Give every row a place: its old one, or a free one, if possible with its adapter in it.

        Args:
            wanted: row -> adapter, in the order of arrival.
        """
        n = len(wanted)
        places: list[str | None] = [row if row in wanted else None for row in self.rows[:n]]
        places += [None] * (n - len(places))
        seated = {row for row in places if row is not None}
        free = [i for i, row in enumerate(places) if row is None]
        for row in (r for r in wanted if r not in seated):
            same = [i for i in free if i < len(self.written) and self.written[i] is wanted[row]]
            place = same[0] if same else free[0]
            free.remove(place)
            places[place] = row
        self.rows = [row for row in places if row is not None]
        self.adapters = [wanted[row] for row in self.rows]

    def uniform(self) -> bool:
        """Whether all rows have one adapter."""
        return all(adapter is self.adapters[0] for adapter in self.adapters)

    def write(self) -> None:
        """Bring the stacks up to date: only places whose adapter is another one are written."""
        self.written += [None] * (len(self.adapters) - len(self.written))
        changed = [i for i, a in enumerate(self.adapters) if self.written[i] is not a]
        names = dict.fromkeys(name for adapter in self.adapters for name in adapter.sites)
        for name in list(self.stacks):
            if name not in names:
                del self.stacks[name]
        for name in names:
            self._write_layer(name, changed)
        for i in changed:
            self.written[i] = self.adapters[i]
        n = len(self.adapters)
        # A stack that was made anew holds the rows of now and nothing behind them.
        del self.written[n:]
        self.live = {name: stack.first(n) for name, stack in self.stacks.items()}

    def _write_layer(self, name: str, changed: list[int]) -> None:
        sites = [adapter.sites.get(name) for adapter in self.adapters]
        known = [site for site in sites if site is not None]
        if known[0].embedding:
            return
        stack = self.stacks.get(name)
        if stack is None or not _fits(stack, known, len(sites)):
            stack = self.stacks[name] = _new_stack(known, len(sites))
            changed = list(range(len(sites)))
        for i in changed:
            _write(stack, i, sites[i])


def _fits(stack: _Stack, sites: Sequence[ServedSite], num_rows: int) -> bool:
    return (
        stack.A.shape[0] >= num_rows
        and stack.A.shape[1] >= max(site.r for site in sites)
        and (stack.gain is not None or all(site.gain is None for site in sites))
        and (stack.shift is not None or all(site.shift is None for site in sites))
    )


def _new_stack(sites: Sequence[ServedSite], num_rows: int) -> _Stack:
    places = 1 << (num_rows - 1).bit_length()
    rank = -(-max(site.r for site in sites) // _STEP) * _STEP
    A, B = sites[0].A, sites[0].B
    out = B.shape[1]
    gain = any(site.gain is not None for site in sites)
    shift = any(site.shift is not None for site in sites)
    return _Stack(
        A=A.new_zeros((places, rank, A.shape[1])),
        B=B.new_zeros((places, rank, out)),
        gain=B.new_zeros((places, 1, out)) if gain else None,
        shift=B.new_zeros((places, 1, out)) if shift else None,
    )


def _write(stack: _Stack, place: int, site: ServedSite | None) -> None:
    # Rows of B that meet a zero of A may keep what they hold: it is finite.
    r = 0 if site is None else site.r
    stack.A[place, r:].zero_()
    if site is not None:
        stack.A[place, :r].copy_(site.A)
        stack.B[place, :r].copy_(site.B)
    for target, value in (
        (stack.gain, None if site is None else site.gain),
        (stack.shift, None if site is None else site.shift),
    ):
        if target is not None:
            target[place, 0].zero_() if value is None else target[place, 0].copy_(value)


class Bank:
    """The groups of the rows that are under way."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, bool], _Group] = {}

    def arrange(self, rows: Sequence[tuple[str, ServedAdapter | None]]) -> TokenRouting:
        """Seat the rows, and say in which order they stand in the batch.

        Rows without an adapter come first and cost nothing; the rest stand group by group.

        Args:
            rows: each row's id and adapter.

        Returns:
            The routing; its `order` lists the rows' ids.
        """
        wanted: dict[tuple[int, bool], dict[str, ServedAdapter]] = {}
        for row, adapter in rows:
            if adapter is not None:
                wanted.setdefault(_class_of(adapter), {})[row] = adapter
        # What nothing uses is let go: a bank holds copies.
        self._groups = {k: g for k, g in self._groups.items() if k in wanted}
        order = [row for row, adapter in rows if adapter is None]
        groups: list[GroupedRows] = []
        for key in sorted(wanted):
            group = self._groups.setdefault(key, _Group())
            group.seat(wanted[key])
            if group.uniform():
                segment: RowSegment = AdapterRows(group.adapters[0])
            else:
                group.write()
                segment = group
            groups.append(GroupedRows(len(order), len(order) + len(group.rows), segment))
            order += group.rows
        return TokenRouting(order=tuple(order), groups=tuple(groups))

    def clear(self) -> None:
        """Let everything go."""
        self._groups = {}


def _class_of(adapter: ServedAdapter) -> tuple[int, bool]:
    limit = next((c for c in _CLASSES if adapter.r <= c), adapter.r)
    return limit, adapter.affine
