"""The examples of a data set, of any task."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Generic, TypeVar, overload

E = TypeVar("E", bound=Sized)
R = TypeVar("R")


class ExampleList(Sequence[E], Generic[E, R]):
    """Examples with the report on them; also a map-style torch data set.

    Args:
        examples: each with a length in tokens.
        report: what tokenising found.
    """

    def __init__(self, examples: list[E], report: R) -> None:
        self._examples = examples
        self.report = report

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        return self._examples[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example) for example in self._examples]
