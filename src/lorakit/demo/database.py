"""The demo's databases in SQLite: rows drawn once per domain, always the same."""

from __future__ import annotations

import itertools
import random
import sqlite3
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

from lorakit.demo.domains import Column, Domain, Table, Value, domain
from lorakit.demo.mixed import mixed_domain

_GIVEN = [
    "Ana",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Simon",
    "Tara",
    "Viktor",
    "Wanda",
    "Yusuf",
    "Zoe",
    "Amir",
    "Beth",
    "Carlos",
    "Dora",
    "Emil",
]
_FAMILY = [
    "Adler",
    "Brandt",
    "Costa",
    "Duran",
    "Ek",
    "Fischer",
    "Garcia",
    "Holm",
    "Ivanov",
    "Jensen",
    "Kovacs",
    "Larsen",
    "Moreau",
    "Novak",
    "Okoye",
    "Petrov",
    "Quinn",
    "Rossi",
    "Sato",
    "Torres",
    "Ueda",
    "Varga",
    "Weber",
    "Xu",
    "Young",
    "Zhang",
]
_CITIES = [
    "Berlin",
    "Madrid",
    "Oslo",
    "Lyon",
    "Porto",
    "Vienna",
    "Krakow",
    "Dublin",
    "Athens",
    "Lima",
    "Boston",
    "Kyoto",
    "Cairo",
    "Quito",
    "Havana",
    "Denver",
    "Turin",
    "Leeds",
]
_COUNTRIES = [
    "Germany",
    "Spain",
    "Norway",
    "France",
    "Portugal",
    "Austria",
    "Poland",
    "Ireland",
    "Greece",
    "Peru",
    "Japan",
    "Egypt",
    "Canada",
    "India",
    "Brazil",
    "Kenya",
    "Sweden",
    "Italy",
]
# A column that does not name its rows repeats its values: that is what DISTINCT and GROUP BY need.
_NUM_REPEATED = 6
# A sixth of the parents stay without children.
_SHARE_WITH_CHILDREN = 5 / 6


def open_database(name: str) -> sqlite3.Connection:
    """A new in-memory database of the domain called `name`, filled with its rows."""
    connection = sqlite3.connect(":memory:")
    _fill(connection, mixed_domain(name) or domain(name))
    return connection


def write_database(name: str, path: Path) -> None:
    """Write the database of the domain called `name` to an SQLite file at `path`, which is new."""
    with closing(open_database(name)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def _fill(connection: sqlite3.Connection, schema: Domain) -> None:
    rng = random.Random(f"rows of {schema.name}")
    num_rows = {table.name: table.num_rows for table in schema.tables}
    for table in schema.tables:
        connection.execute(_create(table))
        columns = [_values(column, table.num_rows, num_rows, rng) for column in table.columns]
        rows = list(zip(range(1, table.num_rows + 1), *columns, strict=True))
        marks = ", ".join("?" * (len(columns) + 1))
        connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
    connection.commit()


def _create(table: Table) -> str:
    types = {"integer": "INTEGER", "year": "INTEGER", "real": "REAL"}
    parts = ["id INTEGER PRIMARY KEY"]
    for column in table.columns:
        if column.kind == "key":
            parts.append(f"{column.name} INTEGER REFERENCES {column.values}(id)")
        else:
            parts.append(f"{column.name} {types.get(column.kind, 'TEXT')}")
    return f"CREATE TABLE {table.name} ({', '.join(parts)})"


def _values(
    column: Column, count: int, num_rows: dict[str, int], rng: random.Random
) -> list[Value]:
    if column.kind == "key":
        parents = num_rows[column.values]
        used = rng.sample(range(1, parents + 1), round(parents * _SHARE_WITH_CHILDREN))
        return [rng.choice(used) for _ in range(count)]
    if column.kind in ("name", "category"):
        return _words(column, count, rng)
    return [_quantity(column, rng) for _ in range(count)]


def _words(column: Column, count: int, rng: random.Random) -> list[Value]:
    pool = _pool(column.values)
    if column.kind == "name":
        if len(pool) < count:
            raise ValueError(f"{column.name}: {count} rows but only {len(pool)} names")
        return list(rng.sample(pool, count))
    if column.values.startswith("@"):
        pool = rng.sample(pool, _NUM_REPEATED)
    return [rng.choice(pool) for _ in range(count)]


def _pool(values: str) -> list[str]:
    pools: dict[str, list[str]] = {"@city": _CITIES, "@country": _COUNTRIES}
    if values == "@person":
        return [f"{given} {family}" for given in _GIVEN for family in _FAMILY]
    if values in pools:
        return pools[values]
    if "|" in values:
        return values.split("|")
    parts = [part.strip().split(",") for part in values.split("+")]
    return [" ".join(words) for words in itertools.product(*parts)]


def _quantity(column: Column, rng: random.Random) -> Value:
    low, high = column.values.split("..")
    if column.kind == "date":
        first, last = date.fromisoformat(low), date.fromisoformat(high)
        return (first + timedelta(days=rng.randint(0, (last - first).days))).isoformat()
    if column.kind == "real":
        digits = len(low.partition(".")[2])
        return round(rng.uniform(float(low), float(high)), digits)
    number = rng.randint(int(low), int(high))
    # Large amounts are round, as people state them.
    step = 10 ** max(0, len(high) - 3) if column.kind == "integer" else 1
    return max(int(low), number // step * step)
