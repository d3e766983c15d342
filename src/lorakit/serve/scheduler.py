"""Who is next: fair between adapters, first come first served within one.

Every adapter (and the base, and every composition) has an account of the work that was done for it;
the waiting adapter with the smallest account goes first. This is the virtual token counter of Sheng
et al. 2024 (Fairness in Serving Large Language Models, arXiv 2401.00588, algorithm 2): an adapter
that comes back after a pause is lifted to the smallest account of those at work, so that nobody
saves up a claim to the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from lorakit.serve.row import Row

# A generated token costs a forward pass; a prompt's share one.
_PROMPT_WEIGHT = 1
_GENERATED_WEIGHT = 2
_MOST_ACCOUNTS = 4096

Outcome = Literal["taken", "later", "full"]


class FairQueue:
    """The rows that wait; used by the engine's thread alone."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Row]] = {}
        self._accounts: dict[str, float] = {}
        self._active: dict[str, int] = {}  # rows waiting or running
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._waiting.values())

    def rows(self) -> Iterable[Row]:
        """Every waiting row."""
        return [row for rows in self._waiting.values() for row in rows]

    def add(self, row: Row) -> None:
        """Queue a row behind those of its adapter."""
        if not self._active.get(row.label):
            self._lift(row.label)
        self._active[row.label] = self._active.get(row.label, 0) + 1
        self._waiting.setdefault(row.label, deque()).append(row)

    def remove(self, row: Row) -> None:
        """Take a row out that is not to be answered."""
        self._pop(row)
        self.leave(row)

    def leave(self, row: Row) -> None:
        """A row that was taken is finished."""
        self._active[row.label] -= 1
        if not self._active[row.label]:
            del self._active[row.label]

    def charge(self, row: Row, *, generated: int = 0) -> None:
        """Put work on the account of a row's adapter."""
        self._accounts[row.label] += _GENERATED_WEIGHT * generated

    def take(self, attempt: Callable[[Row], Outcome]) -> None:
        """Offer waiting rows, fairest first, until none can be taken.

        Args:
            attempt: tries to start a row. "taken": it runs, or has failed for good. "later": its
                adapter is not there yet; others go on. "full": there is no room; nobody goes past
                a row that waits for room.
        """
        later: set[str] = set()
        while True:
            labels = [label for label in self._waiting if label not in later]
            if not labels:
                return
            label = min(labels, key=lambda name: self._accounts[name])
            row = self._waiting[label][0]
            outcome = attempt(row)
            if outcome == "full":
                return
            if outcome == "later":
                later.add(label)
                continue
            self._pop(row)
            if row.state == "running":
                self._accounts[label] += _PROMPT_WEIGHT * len(row.prompt)
            else:
                self.leave(row)

    def _pop(self, row: Row) -> None:
        rows = self._waiting[row.label]
        rows.remove(row)
        if not rows:
            del self._waiting[row.label]

    def _lift(self, label: str) -> None:
        active = [self._accounts[name] for name in self._active]
        if active:
            self._floor = max(self._floor, min(active))
        self._accounts[label] = max(self._accounts.get(label, 0.0), self._floor)
        if len(self._accounts) > _MOST_ACCOUNTS:
            # Accounts below the floor are lifted to it anyway.
            self._accounts = {
                name: value
                for name, value in self._accounts.items()
                if name in self._active or name == label or value > self._floor
            }
