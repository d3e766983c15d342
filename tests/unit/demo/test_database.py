"""The demo's schemas and rows: enough of them, consistent, always the same."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lorakit.demo.database import open_database, write_database
from lorakit.demo.domains import Domain, Split, domain, domains
from lorakit.demo.query import Select, gold_rows

SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")
ALL = [d for split in SPLITS for d in domains(split)]


def test_there_are_enough_domains() -> None:
    assert len(domains("train")) >= 18
    assert len(domains("held_out")) >= 6
    assert len({d.name for d in ALL}) == len(ALL) >= 24


@pytest.mark.parametrize("schema", ALL, ids=lambda d: d.name)
def test_a_domain_has_rows_and_its_keys_point_somewhere(schema: Domain) -> None:
    connection = open_database(schema.name)
    assert 2 <= len(schema.tables) <= 3
    assert any(t.parents for t in schema.tables)
    for table in schema.tables:
        (count,) = connection.execute(f"SELECT COUNT(*) FROM {table.name}").fetchone()
        assert 15 <= count == table.num_rows <= 40
        if table.title:
            query = f"SELECT COUNT(DISTINCT {table.title.name}) FROM {table.name}"
            assert connection.execute(query).fetchone() == (count,)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_database_is_the_same_every_time(tmp_path: Path) -> None:
    dump = list(open_database("museum").iterdump())
    assert dump == list(open_database("museum").iterdump())
    write_database("museum", tmp_path / "museum.sqlite")
    with sqlite3.connect(tmp_path / "museum.sqlite") as connection:
        assert list(connection.iterdump()) == dump
    connection.close()


def test_the_schema_text_names_tables_columns_and_keys() -> None:
    assert domain("winery").schema_text.splitlines() == [
        "winery(id, name, region, owner, vineyard_area)",
        "wine(id, label, winery_id -> winery.id, grape, vintage, bottle_price, alcohol)",
    ]


def test_columns_know_what_they_hold() -> None:
    kinds = {c.name: c.kind for t in domain("hotel").tables for c in t.columns}
    assert kinds["name"] == "name"
    assert kinds["channel"] == "category"
    assert kinds["room_count"] == "integer"
    assert kinds["cost"] == "real"
    assert kinds["arrival_date"] == "date"
    assert kinds["hotel_id"] == "key"
    assert {c.name: c.kind for t in domain("museum").tables for c in t.columns}[
        "founding_year"
    ] == "year"


@pytest.fixture
def numbers() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, x INTEGER)")
    rows = [("a", 5), ("b", 3), ("c", 3), ("d", 1)]
    connection.executemany("INSERT INTO t (name, x) VALUES (?, ?)", rows)
    return connection


def test_a_tie_in_the_order_is_refused(numbers: sqlite3.Connection) -> None:
    top = Select(columns=("name",), table="t", order="x", descending=True)
    assert gold_rows(numbers, top) is None


def test_a_tie_across_the_limit_is_refused_and_one_behind_it_is_not(
    numbers: sqlite3.Connection,
) -> None:
    def best(limit: int) -> Select:
        return Select(columns=("name",), table="t", order="x", descending=True, limit=limit)

    assert gold_rows(numbers, best(2)) is None
    assert gold_rows(numbers, best(1)) == [("a",)]


@pytest.mark.parametrize(
    "query",
    [
        Select(columns=("name",), table="t", where=("x > 9",)),  # nothing
        Select(columns=("name",), table="t", where=("x > 0",)),  # everything
        Select(columns=("COUNT(*)",), table="t", where=("x > 9",)),  # a lone 0
        Select(columns=("SUM(x)",), table="t", where=("x > 9",)),  # a lone NULL
        Select(columns=("name",), table="t", where=("x > 2", "x > 4")),  # one condition is idle
        Select(columns=("name",), table="t", distinct=True),  # no duplicates to remove
        Select(columns=("x",), table="t", group="x", having="COUNT(*) > 0"),  # keeps all
        Select(columns=("name",), table="t", where=("x > 3",), order="x", limit=3),  # cuts nothing
    ],
)
def test_an_answer_that_shows_nothing_is_refused(
    numbers: sqlite3.Connection, query: Select
) -> None:
    assert gold_rows(numbers, query) is None


def test_a_query_is_written_in_one_style() -> None:
    query = Select(
        columns=("p.name", "COUNT(*)"),
        table="c",
        join=("p", "c", "p_id"),
        where=("c.x > 1", "c.y = 'z'"),
        group="p.name",
        having="COUNT(*) > 2",
        order="COUNT(*)",
        descending=True,
        limit=3,
    )
    assert query.sql() == (
        "SELECT p.name, COUNT(*) FROM c JOIN p ON c.p_id = p.id WHERE c.x > 1 AND c.y = 'z' "
        "GROUP BY p.name HAVING COUNT(*) > 2 ORDER BY COUNT(*) DESC LIMIT 3"
    )
