"""What an intent draws from: tables, columns, values and conditions of one database."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lorakit.demo.domains import Column, Domain, Table, Value
from lorakit.demo.phrases import comparison, literal

T = TypeVar("T")


class UnsuitableError(Exception):
    """This database has nothing of the kind that the intent needs."""


class Relation(NamedTuple):
    """A foreign key: `child.key` points to `parent.id`."""

    parent: Table
    child: Table
    key: str

    @property
    def join(self) -> tuple[str, str, str]:
        """The join as `Select` takes it."""
        return self.parent.name, self.child.name, self.key


class Condition(NamedTuple):
    """A condition as English ("whose price is above 9") and as SQL ("price > 9")."""

    text: str
    sql: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One database and one source of randomness."""

    schema: Domain
    connection: sqlite3.Connection
    rng: random.Random

    def pick(self, items: Iterable[T]) -> T:
        """One of the items.

        Raises:
            UnsuitableError: there are none.
        """
        choices = list(items)
        if not choices:
            raise UnsuitableError
        return self.rng.choice(choices)

    def table(self, *, titled: bool = False) -> Table:
        """A table; with `titled`, one whose rows have a name."""
        return self.pick(t for t in self.schema.tables if t.title or not titled)

    def relation(self, *, titled_child: bool = False) -> Relation:
        """A foreign key to a table whose rows have a name."""
        found = [
            Relation(self.schema.table(parent), child, key)
            for child in self.schema.tables
            for key, parent in child.parents.items()
        ]
        return self.pick(r for r in found if r.parent.title and (r.child.title or not titled_child))

    def column(self, table: Table, fits: Callable[[Column], bool]) -> Column:
        """A column of the table, no key, for which `fits` holds."""
        return self.pick(c for c in table.columns if c.kind != "key" and fits(c))

    def shown(self, table: Table, *, most: int = 2) -> list[Column]:
        """Columns to show: usually the name of the rows, sometimes another beside or instead."""
        rest = [c for c in table.columns if c.kind != "key" and c is not table.title]
        self.rng.shuffle(rest)
        first = [table.title] if table.title and self.rng.random() < 0.8 else []
        return (first + rest)[: self.rng.randint(1, most)]

    def value(self, table: Table, column: Column) -> Value:
        """A value that occurs in the column."""
        rows = self.connection.execute(f"SELECT {column.name} FROM {table.name} ORDER BY id")
        return self.pick(row[0] for row in rows)

    def condition(self, table: Table, *, qualified: bool = False) -> Condition:
        """A comparison of one column with a value that occurs in it."""
        column = self.column(table, lambda c: c.kind != "name")
        if column.is_text:
            operator = self.rng.choice(["=", "=", "=", "!="])
        else:
            operator = self.rng.choice([">", ">", "<", "<", ">=", "<=", "="])
            if operator == "=" and column.kind not in ("integer", "year"):
                operator = ">"
        value = self.value(table, column)
        said = comparison(column, operator, value, self.rng)
        name = f"{table.name}.{column.name}" if qualified else column.name
        return Condition(self._whose(column, said), f"{name} {operator} {literal(value)}")

    def between(self, table: Table) -> Condition:
        """A range between two values that occur in the column."""
        column = self.column(table, lambda c: c.is_ordered)
        low, high = sorted((self.value(table, column), self.value(table, column)), key=_sort_key)
        if low == high:
            raise UnsuitableError
        sql = f"{column.name} BETWEEN {literal(low)} AND {literal(high)}"
        return Condition(self._whose(column, f"is between {low} and {high}"), sql)

    def like(self, table: Table) -> Condition:
        """A part of a text that occurs in the column."""
        column = self.column(table, lambda c: c.is_text)
        text = str(self.value(table, column))
        how = self.rng.choice(["starts with", "ends with", "contains"])
        if how == "starts with":
            part, pattern = text[:3].strip(), "{}%"
        elif how == "ends with":
            part, pattern = text[-3:].strip(), "%{}"
        else:
            part, pattern = self.rng.choice(text.split()), "%{}%"
        sql = f"{column.name} LIKE {literal(pattern.format(part))}"
        return Condition(f"whose {column.phrase} {how} '{part}'", sql)

    def _whose(self, column: Column, said: str) -> str:
        forms = [f"whose {column.phrase} {said}", f"where the {column.phrase} {said}"]
        if not said.startswith("is not"):
            forms.append(f"with {column.phrase} {said.removeprefix('is ')}")
        return self.rng.choice(forms)


def _sort_key(value: Value) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (float(value), "")
