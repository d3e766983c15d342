"""Progress of long work on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorakit.launcher import speaks

T = TypeVar("T")

PLAIN_EVERY_S = 15.0


class Bar(Protocol):
    """What a running piece of work reports to."""

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Move on by `steps`; `note` is shown behind the bar (a loss, a rate)."""
        ...


class _RichBar:
    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, note="")

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)


class _NoBar:
    """Of several processes the first one shows how far the work is."""

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Nothing."""


class _PlainBar:
    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            self._line(note)

    def close(self) -> None:
        self._line("done")

    def _line(self, note: str) -> None:
        of = f"/{self._total}" if self._total is not None else ""
        elapsed_s = time.monotonic() - self._started
        line = f"{self._label}: {self._done}{of}  {elapsed_s:.0f} s  {note}".rstrip()
        # A log that takes no more (a full disk, a closed pipe) does not end the work.
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Bar]:
    """A bar for the work in this block.

    Args:
        label: what is being done, as a short present participle ("training", "answering").
        total: the number of steps, or None when it is not known.
    """
    console = Console(stderr=True)
    if not speaks():
        yield _NoBar()
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=False) as rich_progress:
            yield _RichBar(rich_progress, label, total)
    else:
        bar = _PlainBar(label, total)
        yield bar
        bar.close()


def track(items: Iterable[T], label: str, *, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how far the work is."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    with progress(label, total) as bar:
        for item in items:
            yield item
            bar.advance()
