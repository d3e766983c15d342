"""What can be asked of one table: each intent draws a query and the words that say it."""

from __future__ import annotations

from lorakit.demo.domains import Table
from lorakit.demo.drafts import Draft, draw_aggregate, plain, title_of, what, words
from lorakit.demo.phrases import extreme, literal, ordering, plural
from lorakit.demo.query import Select
from lorakit.demo.scene import Condition, Scene, UnsuitableError


def lookup(scene: Scene) -> Draft:
    """Columns of the one row with a name."""
    table = scene.table(titled=True)
    title = title_of(table)
    rest = [c for c in table.columns if c.kind != "key" and c is not title]
    columns = scene.rng.sample(rest, scene.rng.randint(1, min(2, len(rest))))
    name = scene.value(table, title)
    query = Select(
        columns=plain(columns), table=table.name, where=(f"{title.name} = {literal(name)}",)
    )
    gaps = {"what": what(columns), "title": title.phrase, "name": name}
    return Draft(query, "lookup", words(table) | gaps)


def _select(scene: Scene, table: Table, conditions: list[Condition], glue: str = "AND") -> Draft:
    columns = scene.shown(table)
    text = f" {glue.lower()} ".join(c.text for c in conditions)
    where = tuple(c.sql for c in conditions)
    query = Select(columns=plain(columns), table=table.name, where=where, glue=glue)
    return Draft(query, "select", words(table) | {"what": what(columns), "cond": text})


def select_one(scene: Scene) -> Draft:
    """Rows that meet one condition."""
    table = scene.table()
    return _select(scene, table, [scene.condition(table)])


def select_two(scene: Scene) -> Draft:
    """Rows that meet both, or either, of two conditions."""
    table = scene.table()
    conditions = [scene.condition(table), scene.condition(table)]
    if conditions[0].sql.split()[0] == conditions[1].sql.split()[0]:
        raise UnsuitableError
    return _select(scene, table, conditions, scene.rng.choice(["AND", "AND", "OR"]))


def select_between(scene: Scene) -> Draft:
    """Rows with a value in a range."""
    table = scene.table()
    return _select(scene, table, [scene.between(table)])


def select_like(scene: Scene) -> Draft:
    """Rows whose text starts or ends with something, or contains it."""
    table = scene.table()
    return _select(scene, table, [scene.like(table)])


def distinct(scene: Scene) -> Draft:
    """The different values of a column."""
    table = scene.table()
    column = scene.column(table, lambda c: c.kind == "category")
    query = Select(columns=(column.name,), table=table.name, distinct=True)
    gaps = {"columns": plural(column.phrase), "column": column.phrase}
    return Draft(query, "distinct", words(table) | gaps)


def count(scene: Scene) -> Draft:
    """The number of rows that meet a condition."""
    table = scene.table()
    condition = scene.condition(table)
    query = Select(columns=("COUNT(*)",), table=table.name, where=(condition.sql,))
    return Draft(query, "count", words(table) | {"cond": condition.text})


def count_distinct(scene: Scene) -> Draft:
    """The number of different values of a column."""
    table = scene.table()
    column = scene.column(table, lambda c: c.kind == "category")
    query = Select(columns=(f"COUNT(DISTINCT {column.name})",), table=table.name)
    return Draft(query, "count_distinct", words(table) | {"columns": plural(column.phrase)})


def aggregate(scene: Scene) -> Draft:
    """A sum, average, minimum or maximum, of all rows or of those that meet a condition."""
    table = scene.table()
    column, function, said = draw_aggregate(scene, table)
    text, where = _optional_condition(scene, table)
    query = Select(columns=(f"{function}({column.name})",), table=table.name, where=where)
    gaps = {"aggregate": said, "column": column.phrase, "cond": text}
    return Draft(query, "aggregate", words(table) | gaps)


def _optional_condition(scene: Scene, table: Table) -> tuple[str, tuple[str, ...]]:
    if scene.rng.random() < 0.5:
        return "", ()
    condition = scene.condition(table)
    return f" {condition.text}", (condition.sql,)


def order(scene: Scene) -> Draft:
    """Rows in the order of a column."""
    table = scene.table()
    columns = scene.shown(table)
    key = scene.column(table, lambda c: c.is_ordered or c.kind == "name")
    descending = scene.rng.random() < 0.5
    text, where = _optional_condition(scene, table)
    query = Select(
        columns=plain(columns),
        table=table.name,
        where=where,
        order=key.name,
        descending=descending,
    )
    gaps = {"what": what(columns), "cond": text, "order": ordering(key, descending, scene.rng)}
    return Draft(query, "order", words(table) | gaps)


def _top(scene: Scene, limit: int, phrasing: str) -> Draft:
    table = scene.table(titled=True)
    columns = scene.shown(table)
    key = scene.column(table, lambda c: c.is_ordered)
    highest = scene.rng.random() < 0.5
    query = Select(
        columns=plain(columns),
        table=table.name,
        order=key.name,
        descending=highest,
        limit=limit,
    )
    gaps = {"what": what(columns), "limit": limit, "column": key.phrase}
    return Draft(query, phrasing, words(table) | gaps | {"extreme": extreme(key, highest)})


def top(scene: Scene) -> Draft:
    """The first few rows by a column."""
    return _top(scene, scene.rng.randint(2, 6), "top")


def superlative(scene: Scene) -> Draft:
    """The row with the highest or lowest value."""
    return _top(scene, 1, "superlative")


def group_count(scene: Scene) -> Draft:
    """The number of rows per category."""
    table = scene.table()
    group = scene.column(table, lambda c: c.kind == "category")
    query = Select(columns=(group.name, "COUNT(*)"), table=table.name, group=group.name)
    return Draft(query, "group_count", words(table) | {"group": group.phrase})


def group_aggregate(scene: Scene) -> Draft:
    """A sum, average, minimum or maximum per category."""
    table = scene.table()
    group = scene.column(table, lambda c: c.kind == "category")
    column, function, said = draw_aggregate(scene, table)
    columns = (group.name, f"{function}({column.name})")
    query = Select(columns=columns, table=table.name, group=group.name)
    gaps = {"group": group.phrase, "aggregate": said, "column": column.phrase}
    return Draft(query, "group_aggregate", words(table) | gaps)


def having(scene: Scene) -> Draft:
    """The categories with many or few rows."""
    table = scene.table()
    group = scene.column(table, lambda c: c.kind == "category")
    sizes = scene.connection.execute(f"SELECT COUNT(*) FROM {table.name} GROUP BY {group.name}")
    number = scene.pick(size for (size,) in sizes.fetchall())
    operator, said = scene.rng.choice(
        [(">", "more than"), (">=", "at least"), ("<", "fewer than"), ("<=", "at most")]
    )
    query = Select(
        columns=(group.name,),
        table=table.name,
        group=group.name,
        having=f"COUNT(*) {operator} {number}",
    )
    gaps = {"group": group.phrase, "groups": plural(group.phrase), "bound": f"{said} {number}"}
    return Draft(query, "having", words(table) | gaps)
