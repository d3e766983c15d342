from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lorakit.errors import DataError
from lorakit.evaluate.sql import SqlError, extract_sql, is_ordered, run_sql, same_result


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop #1?.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE item (id INTEGER, name TEXT, price REAL);"
        "INSERT INTO item VALUES (1, 'nut', 0.1), (2, 'bolt', 0.2), (3, 'gear; large', 7.5);"
    )
    connection.commit()
    connection.close()
    return path


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("Here you are: select a from b; that is all", "select a from b"),
        ("```sql\nSELECT a\nFROM b;\n```\nIt selects a.", "SELECT a\nFROM b"),
        ("```\nSELECT a FROM b", "SELECT a FROM b"),
        ("I select with care.\n```sql\nSELECT 2\n```", "SELECT 2"),
        ("SELECT a FROM b WHERE c = 'x;y' ; SELECT 2", "SELECT a FROM b WHERE c = 'x;y'"),
        ("A query with a filter: SELECT 3", "SELECT 3"),
        ("with t AS (SELECT 1 AS x) SELECT x FROM t;", "with t AS (SELECT 1 AS x) SELECT x FROM t"),
        (
            "So: WITH RECURSIVE t(x) AS (SELECT 1) SELECT x FROM t",
            "WITH RECURSIVE t(x) AS (SELECT 1) SELECT x FROM t",
        ),
        ("SELECT 'it''s; fine' -- a; b\n, 1; no", "SELECT 'it''s; fine' -- a; b\n, 1"),
        ("  no query here ", "no query here"),
        ("", ""),
        ("selection of rows", "selection of rows"),
    ],
)
def test_extract_sql(text: str, sql: str) -> None:
    assert extract_sql(text) == sql


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM b ORDER BY a", True),
        ("select a from b order\n  by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM b ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM b", False),
        ("SELECT 'order by' FROM b", False),
        ("SELECT a FROM b -- ORDER BY a", False),
        ("SELECT order_by FROM b", False),
        ("SELECT a FROM b WHERE c IN (SELECT d FROM e) ORDER /* so */ BY a", True),
    ],
)
def test_is_ordered(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


def test_runs_on_a_path_and_on_a_connection(database: Path) -> None:
    sql = "SELECT name FROM item WHERE price > 0.15 ORDER BY id"
    assert run_sql(database, sql) == [("bolt",), ("gear; large",)]
    connection = sqlite3.connect(database)
    assert run_sql(connection, sql) == [("bolt",), ("gear; large",)]
    connection.close()


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM item",
        "INSERT INTO item VALUES (9, 'x', 1)",
        "DROP TABLE item",
        "CREATE TABLE other (a)",
        "PRAGMA query_only = OFF",
        "ATTACH DATABASE 'other.db' AS other",
        "BEGIN",
        "VACUUM",
        "SELECT load_extension('x')",
        "SELECT 1; DELETE FROM item",
        "UPDATE item SET price = 0 RETURNING id",
    ],
)
def test_nothing_but_reading_is_allowed(
    database: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(database.parent)
    before = database.read_bytes()
    connection = sqlite3.connect(database)
    with pytest.raises(SqlError):
        run_sql(connection, sql)
    assert not connection.in_transaction
    connection.close()
    with pytest.raises(SqlError):
        run_sql(database, sql)
    assert database.read_bytes() == before
    assert [p.name for p in database.parent.iterdir()] == [database.name]


def test_the_connection_is_given_back_as_it_was(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    with pytest.raises(SqlError):
        run_sql(connection, "DELETE FROM item")
    assert type(run_sql(connection, "SELECT id FROM item")[0]) is tuple
    assert connection.row_factory is sqlite3.Row
    connection.execute("DELETE FROM item")
    assert connection.execute("SELECT count(*) FROM item").fetchone()[0] == 0
    assert len(connection.execute("SELECT zeroblob(5000000)").fetchone()[0]) == 5_000_000
    connection.close()


def test_a_query_without_end_is_stopped(database: Path) -> None:
    endless = (
        "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"
    )
    with pytest.raises(SqlError, match="takes too long"):
        run_sql(database, endless, max_steps=200_000)


def test_results_and_values_are_bounded(database: Path) -> None:
    with pytest.raises(SqlError, match="too many rows"):
        run_sql(database, "SELECT id FROM item", max_rows=2)
    assert len(run_sql(database, "SELECT id FROM item", max_rows=3)) == 3
    with pytest.raises(SqlError, match="cannot be run"):
        run_sql(database, "SELECT zeroblob(900000000)")


@pytest.mark.parametrize("sql", ["", "   ", "SELECT", "no query", "SELECT nothing FROM item", "\0"])
def test_a_wrong_query_is_one_clear_error(database: Path, sql: str) -> None:
    with pytest.raises(SqlError):
        run_sql(database, sql)


def test_a_wrong_database_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no database file"):
        run_sql(tmp_path / "absent.db", "SELECT 1")
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 40)
    with pytest.raises(DataError, match="not an SQLite database"):
        run_sql(tmp_path / "text.db", "SELECT 1")


def test_same_result() -> None:
    a = [(1, "x"), (2, "y"), (2, "y")]
    assert same_result(a, list(a), ordered=True)
    assert same_result(a, a[::-1], ordered=False)
    assert not same_result(a, a[::-1], ordered=True)
    assert not same_result([(1, "x"), (1, "x"), (2, "y")], a, ordered=False)
    assert not same_result(a[:2], a, ordered=False)
    assert same_result([], [], ordered=False)


def test_numbers_agree_within_tolerance_and_types_count() -> None:
    assert same_result([(0.1 + 0.2,)], [(0.3,)], ordered=True)
    assert same_result([(3,)], [(3.0,)], ordered=False)
    assert not same_result([(0.3001,)], [(0.3,)], ordered=False)
    assert not same_result([(10_000_000,)], [(10_000_001,)], ordered=False)
    assert not same_result([("1",)], [(1,)], ordered=False)
    assert not same_result([(None,)], [(0,)], ordered=False)
    assert not same_result([(1, 2)], [(1,)], ordered=False)
    assert same_result([(None, b"x")], [(None, b"x")], ordered=False)


def test_rounding_does_not_break_the_match_of_unordered_rows() -> None:
    # Sorted, the rows pair up wrongly: 0.3 < 0.1 + 0.2.
    pred = [(0.1 + 0.2, 1), (0.3, 2)]
    gold = [(0.1 + 0.2, 2), (0.3, 1)]
    assert same_result(pred, gold, ordered=False)
    assert not same_result(pred, [(0.3, 1), (0.3, 1)], ordered=False)
