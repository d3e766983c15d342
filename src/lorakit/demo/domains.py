"""The demo's databases as data: what a table, a column and a domain are, and how their text reads.

A domain is written like this (an indented line continues the one above):

    # library
    author/authors*16: name=@person; country=@country; birth_year=1901..1985
    book/books*36: title=Red,Lost + River,Garden; author_id>author; price=4.5..39.9

`table/plural*rows`, then columns: `@pool` draws names from a word list (unique where the column
leads the table), `A,B + C,D` combines words into unique names, `A|B` is a category, `low..high` an
integer, a real (with a decimal point), a date (ISO) or, for columns called ..._year, a year, and
`child_id>parent` a foreign key. Every table also has the integer key `id`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lorakit.demo.held_out_domains import HELD_OUT, VALIDATION
from lorakit.demo.training_domains import TRAINING

Value = str | int | float
Kind = Literal["name", "category", "integer", "real", "year", "date", "key"]
Split = Literal["train", "validation", "held_out"]
_SOURCES: dict[Split, str] = {"train": TRAINING, "validation": VALIDATION, "held_out": HELD_OUT}

_HEAD = re.compile(r"(\w+)/([\w ]+)\*(\d+)")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its kind and the specification that its values are drawn from."""

    name: str
    kind: Kind
    values: str

    @property
    def phrase(self) -> str:
        """What the column is called in a question: "page count"."""
        return self.name.replace("_", " ")

    @property
    def is_number(self) -> bool:
        """Whether sums and averages of this column mean something."""
        return self.kind in ("integer", "real")

    @property
    def is_ordered(self) -> bool:
        """Whether more and less mean something."""
        return self.kind in ("integer", "real", "year", "date")

    @property
    def is_text(self) -> bool:
        """Whether the values are words."""
        return self.kind in ("name", "category")


@dataclass(frozen=True, slots=True)
class Table:
    """One table; its first column is its name where that is unique."""

    name: str
    plural: str
    num_rows: int
    columns: tuple[Column, ...]

    @property
    def phrase(self) -> str:
        """One row of the table in a question: "book"."""
        return self.name.replace("_", " ")

    @property
    def title(self) -> Column | None:
        """The column that tells the rows apart, if there is one."""
        first = self.columns[0]
        return first if first.kind == "name" else None

    @property
    def parents(self) -> dict[str, str]:
        """Foreign key column -> the table it points to."""
        return {c.name: c.values for c in self.columns if c.kind == "key"}


@dataclass(frozen=True, slots=True)
class Domain:
    """A database: its tables, parents before children."""

    name: str
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """The table called `name`."""
        return next(t for t in self.tables if t.name == name)

    @property
    def schema_text(self) -> str:
        """The schema as a prompt shows it: one line per table, foreign keys with an arrow."""
        return "\n".join(_schema_line(t) for t in self.tables)


@cache
def domains(split: Split) -> tuple[Domain, ...]:
    """The domains of one split; no domain is in two of them."""
    text = re.sub(r"\n +", " ", _SOURCES[split].strip())
    blocks = re.split(r"^# *", text, flags=re.MULTILINE)
    return tuple(_parse_domain(block) for block in blocks if block.strip())


@cache
def domain(name: str) -> Domain:
    """The domain called `name`, whatever its split.

    Raises:
        KeyError: there is no such domain.
    """
    known = {d.name: d for split in _SOURCES for d in domains(split)}
    return known[name]


def _schema_line(table: Table) -> str:
    parents = table.parents
    shown = [f"{c} -> {parents[c]}.id" if c in parents else c for c in _names(table)]
    return f"{table.name}({', '.join(['id', *shown])})"


def _names(table: Table) -> list[str]:
    return [c.name for c in table.columns]


def _parse_domain(block: str) -> Domain:
    name, *lines = block.strip().splitlines()
    return Domain(name.strip(), tuple(_parse_table(line) for line in lines))


def _parse_table(line: str) -> Table:
    head, _, columns = line.partition(":")
    match = _HEAD.fullmatch(head.strip())
    if match is None:
        raise ValueError(f"not a table: {line!r}")
    name, plural, num_rows = match.groups()
    parsed = tuple(_parse_column(c.strip(), first=i == 0) for i, c in enumerate(columns.split(";")))
    return Table(name, plural, int(num_rows), parsed)


def _parse_column(text: str, *, first: bool) -> Column:
    if ">" in text:
        name, _, parent = text.partition(">")
        return Column(name, "key", parent)
    name, _, values = text.partition("=")
    return Column(name, _kind(name, values, first), values)


def _kind(name: str, values: str, first: bool) -> Kind:
    if ".." in values:
        low = values.split("..")[0]
        if _DATE.fullmatch(low):
            return "date"
        if name.endswith("year") or name == "vintage":
            return "year"
        return "real" if "." in low else "integer"
    return "name" if first and "|" not in values else "category"
