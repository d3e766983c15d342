"""A query in the demo's one style, and the test that each of its clauses matters."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorakit.evaluate.sql import Row, run_sql, same_result


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """One SELECT statement. `join` holds (parent table, child table, foreign key of the child)."""

    columns: tuple[str, ...]
    table: str
    distinct: bool = False
    join: tuple[str, str, str] | None = None
    where: tuple[str, ...] = ()
    glue: str = "AND"
    group: str | None = None
    having: str | None = None
    order: str | None = None
    descending: bool = False
    limit: int | None = None

    def sql(self) -> str:
        """The statement as text: upper-case keywords, single spaces, no final semicolon."""
        parts = [f"SELECT {'DISTINCT ' if self.distinct else ''}{', '.join(self.columns)}"]
        parts.append(f"FROM {self.table}")
        if self.join:
            parent, child, key = self.join
            parts.append(f"JOIN {parent} ON {child}.{key} = {parent}.id")
        if self.where:
            parts.append("WHERE " + f" {self.glue} ".join(self.where))
        if self.group:
            parts.append(f"GROUP BY {self.group}")
        if self.having:
            parts.append(f"HAVING {self.having}")
        if self.order:
            parts.append(f"ORDER BY {self.order}{' DESC' if self.descending else ''}")
        if self.limit:
            parts.append(f"LIMIT {self.limit}")
        return " ".join(parts)


def gold_rows(connection: sqlite3.Connection, query: Select) -> list[Row] | None:
    """The rows of a query that is worth asking, or None.

    Worth asking: the answer is not empty and not a lone NULL or 0, the rows have one right order
    where an order is asked for (no ties), and leaving out any one condition, DISTINCT, HAVING or
    LIMIT changes the answer.
    """
    rows = run_sql(connection, query.sql())
    if not rows or rows in ([(None,)], [(0,)]):
        return None
    if query.order and _has_ties(connection, query):
        return None
    ordered = query.order is not None
    for weaker in _weaker(query):
        if same_result(run_sql(connection, weaker.sql()), rows, ordered):
            return None
    return rows


def _weaker(query: Select) -> Iterator[Select]:
    for i in range(len(query.where)):
        yield replace(query, where=query.where[:i] + query.where[i + 1 :])
    if query.distinct:
        yield replace(query, distinct=False)
    if query.having:
        yield replace(query, having=None)
    if query.limit:
        yield replace(query, limit=None)


def _has_ties(connection: sqlite3.Connection, query: Select) -> bool:
    assert query.order is not None
    every = replace(query, columns=(query.order,), distinct=False, limit=None)
    keys = run_sql(connection, every.sql())
    # The row after the last one counts too: a tie across the limit has two right answers.
    shown = keys[: query.limit + 1] if query.limit else keys
    return len(set(shown)) < len(shown)
