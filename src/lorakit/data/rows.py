"""A data set in memory that knows where each row came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, overload

Row: TypeAlias = dict[str, Any]


class Origin(NamedTuple):
    """Where a row was read: `place` ends with the word that `number` counts ("a.jsonl line")."""

    place: str
    number: int

    def __str__(self) -> str:
        return f"{self.place} {self.number}"


class Rows(Sequence[Row]):
    """A sequence of rows; each row knows its origin, the whole knows its content hash.

    Args:
        rows: the rows, each a dict from column name to value.
        origins: where each row was read, as many as there are rows.
        source: the name of the whole, as the user gave it.
    """

    def __init__(self, rows: list[Row], origins: list[Origin], source: str) -> None:
        if len(rows) != len(origins):
            raise ValueError(f"{len(rows)} rows but {len(origins)} origins")
        self._rows = rows
        self._origins = origins
        self.source = source

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self._rows[index], self._origins[index], self.source)
        return self._rows[index]

    def __repr__(self) -> str:
        return f"Rows({self.source!r}, {len(self)} rows, columns {self.columns})"

    def origin(self, index: int) -> str:
        """Where row `index` was read, for messages: "train.jsonl line 17"."""
        return str(self._origins[index])

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order, with their origins."""
        chosen = list(indices)
        return Rows(
            [self._rows[i] for i in chosen], [self._origins[i] for i in chosen], self.source
        )

    @cached_property
    def columns(self) -> list[str]:
        """The column names that occur, in the order in which they are first seen."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: canonical JSON of each row, in order; file names do not enter."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(canonical(row))
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What a run record and a passport say about the data: source, number of rows, hash."""
        return {"source": self.source, "num_rows": len(self), "sha256": self.sha256}


def without_fillers(row: Row) -> Row:
    """The row of a table without the nulls that its schema puts into nested objects.

    A column of objects has one set of keys for all rows: each tool call gets the arguments of every
    other tool, as nulls, and a template would write them out.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def canonical(row: Row) -> bytes:
    """One row as canonical JSON and a newline: equal bytes exactly when the rows are equal.

    Values that JSON does not know (dates, bytes from a Parquet file) are written by their `str`.
    """
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return text.encode("ascii") + b"\n"
