"""What can be asked of two tables: through a foreign key, or of one table measured by another."""

from __future__ import annotations

from lorakit.demo.domains import Column, Table
from lorakit.demo.drafts import (
    Draft,
    draw_aggregate,
    parent_words,
    plain,
    qualified,
    title_of,
    what,
    words,
)
from lorakit.demo.phrases import article, literal
from lorakit.demo.query import Select
from lorakit.demo.scene import Relation, Scene


def join_lookup(scene: Scene) -> Draft:
    """Columns of the parent of the one row with a name."""
    relation = scene.relation(titled_child=True)
    title = title_of(relation.child)
    columns = scene.shown(relation.parent)
    name = scene.value(relation.child, title)
    query = Select(
        columns=qualified(relation.parent, *columns),
        table=relation.child.name,
        join=relation.join,
        where=(f"{relation.child.name}.{title.name} = {literal(name)}",),
    )
    gaps = {"what": what(columns), "name": name}
    return Draft(query, "join_lookup", parent_words(relation) | gaps)


def join_select(scene: Scene) -> Draft:
    """Rows whose parent meets a condition."""
    relation = scene.relation()
    columns = scene.shown(relation.child)
    return _of_parent(
        scene,
        relation,
        columns=qualified(relation.child, *columns),
        phrasing="join_select",
        gaps={"what": what(columns)},
    )


def join_count(scene: Scene) -> Draft:
    """The number of rows whose parent meets a condition."""
    relation = scene.relation()
    return _of_parent(scene, relation, columns=("COUNT(*)",), phrasing="join_count", gaps={})


def join_aggregate(scene: Scene) -> Draft:
    """A sum, average, minimum or maximum over the rows whose parent meets a condition."""
    relation = scene.relation()
    column, function, said = draw_aggregate(scene, relation.child)
    return _of_parent(
        scene,
        relation,
        columns=(_call(function, relation.child, column),),
        phrasing="join_aggregate",
        gaps={"aggregate": said, "column": column.phrase},
    )


def join_both(scene: Scene) -> Draft:
    """Columns of rows and of their parents, where the rows meet a condition."""
    relation = scene.relation(titled_child=True)
    child, parent = relation.child, relation.parent
    shown, beside = title_of(child), scene.column(parent, lambda c: True)
    condition = scene.condition(child, qualified=True)
    query = Select(
        columns=(*qualified(child, shown), *qualified(parent, beside)),
        table=child.name,
        join=relation.join,
        where=(condition.sql,),
    )
    gaps = {
        "what": what([beside]),
        "child_column": shown.phrase,
        "parent_column": beside.phrase,
        "cond": condition.text,
    }
    return Draft(query, "join_both", parent_words(relation) | gaps)


def children_per_parent(scene: Scene) -> Draft:
    """The number of children of each parent that has any."""
    return _per_parent(scene, scene.relation(), "COUNT(*)", "children_per_parent", {})


def aggregate_per_parent(scene: Scene) -> Draft:
    """A sum, average, minimum or maximum over the children of each parent that has any."""
    relation = scene.relation()
    column, function, said = draw_aggregate(scene, relation.child)
    gaps: dict[str, object] = {"aggregate": said, "column": column.phrase}
    call = _call(function, relation.child, column)
    return _per_parent(scene, relation, call, "aggregate_per_parent", gaps)


def most_children(scene: Scene) -> Draft:
    """The parent with the most children."""
    relation = scene.relation()
    title = title_of(relation.parent)
    (name,) = qualified(relation.parent, title)
    query = Select(
        columns=(name,),
        table=relation.child.name,
        join=relation.join,
        group=name,
        order="COUNT(*)",
        descending=True,
        limit=1,
    )
    return Draft(query, "most_children", parent_words(relation) | {"what": what([title])})


def above_average(scene: Scene) -> Draft:
    """Rows above or below the average of a column."""
    table = scene.table()
    columns = scene.shown(table)
    column = scene.column(table, lambda c: c.is_number)
    above = scene.rng.random() < 0.5
    test = f"{column.name} {'>' if above else '<'} (SELECT AVG({column.name}) FROM {table.name})"
    query = Select(columns=plain(columns), table=table.name, where=(test,))
    gaps = {
        "what": what(columns),
        "column": column.phrase,
        "a_column": article(column.phrase),
        "side": "above" if above else "below",
    }
    return Draft(query, "above_average", words(table) | gaps)


def without_children(scene: Scene) -> Draft:
    """The parents that no row points to."""
    relation = scene.relation()
    columns = scene.shown(relation.parent)
    test = f"id NOT IN (SELECT {relation.key} FROM {relation.child.name})"
    query = Select(columns=plain(columns), table=relation.parent.name, where=(test,))
    return Draft(query, "without_children", parent_words(relation) | {"what": what(columns)})


def _of_parent(
    scene: Scene,
    relation: Relation,
    *,
    columns: tuple[str, ...],
    phrasing: str,
    gaps: dict[str, object],
) -> Draft:
    condition = scene.condition(relation.parent, qualified=True)
    query = Select(
        columns=columns,
        table=relation.child.name,
        join=relation.join,
        where=(condition.sql,),
    )
    return Draft(query, phrasing, parent_words(relation) | gaps | {"cond": condition.text})


def _per_parent(
    scene: Scene, relation: Relation, number: str, phrasing: str, gaps: dict[str, object]
) -> Draft:
    title = title_of(relation.parent)
    (name,) = qualified(relation.parent, title)
    query = Select(
        columns=(name, number), table=relation.child.name, join=relation.join, group=name
    )
    return Draft(
        query,
        phrasing,
        parent_words(relation) | gaps | {"what": what([title]), "title": title.phrase},
    )


def _call(function: str, table: Table, column: Column) -> str:
    return f"{function}({table.name}.{column.name})"
