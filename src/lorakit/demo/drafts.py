"""What an intent hands over, and the small words that all intents need."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.demo.domains import Column, Table
from lorakit.demo.phrases import article, extreme, joined
from lorakit.demo.query import Select
from lorakit.demo.scene import Relation, Scene, UnsuitableError


@dataclass(frozen=True, slots=True)
class Draft:
    """A query, the phrasings to choose from and the words that fill their gaps."""

    query: Select
    phrasing: str
    words: dict[str, object]


def words(table: Table) -> dict[str, object]:
    """The words for a table."""
    return {"one": table.phrase, "a_one": article(table.phrase), "many": table.plural}


def parent_words(relation: Relation) -> dict[str, object]:
    """The words for the two ends of a foreign key."""
    parent = relation.parent
    return {
        **words(relation.child),
        "parent": parent.phrase,
        "a_parent": article(parent.phrase),
        "parents": parent.plural,
    }


def what(columns: list[Column]) -> str:
    """The columns as a question lists them."""
    return joined([c.phrase for c in columns])


def plain(columns: list[Column]) -> tuple[str, ...]:
    """The columns as a query on one table names them."""
    return tuple(c.name for c in columns)


def qualified(table: Table, *columns: Column) -> tuple[str, ...]:
    """The columns as a query on two tables names them."""
    return tuple(f"{table.name}.{c.name}" for c in columns)


def title_of(table: Table) -> Column:
    """The column that names the rows of the table."""
    if table.title is None:
        raise UnsuitableError
    return table.title


def draw_aggregate(scene: Scene, table: Table) -> tuple[Column, str, str]:
    """A column, the function and how it is said."""
    column = scene.column(table, lambda c: c.is_ordered)
    if not column.is_number:
        function = scene.rng.choice(["MIN", "MAX"])
        return column, function, extreme(column, function == "MAX")
    said = {
        "AVG": ("average", "mean"),
        "SUM": ("total",),
        "MIN": ("lowest", "minimum", "smallest"),
        "MAX": ("highest", "maximum", "largest"),
    }
    function = scene.rng.choice(list(said))
    return column, function, scene.rng.choice(said[function])
