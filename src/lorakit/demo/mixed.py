"""More schemas to train on: tables and columns put together anew.

A model that sees 29 schemas learns by heart which table owns which column, and writes `game` where
a table is called `gamer`. Here nothing can be known, it must be read and copied: tables are linked
at random, and their columns drawn from all training domains and from a list of further words. The
questions are as grammatical as ever, if at times odd ("the trains of the doctor Ana Costa").
"""

from __future__ import annotations

import random
from functools import cache

from lorakit.demo.domains import Column, Domain, Table, domains
from lorakit.demo.phrases import plural
from lorakit.demo.words import CATEGORIES, COUNTED, DATED, MEASURES, NOUNS, QUALIFIERS, TITLES

NUM_MIXED = 480
_PREFIX = "mixed_"
_CHILD_ROWS = 34
_PARENT_ROWS = 15
# How often a child has a second parent.
_SHARE_WITH_TWO_PARENTS = 0.3
# How much of a mixed schema is made of words that no training domain has.
_SHARE_NEW_TABLES = 0.75
_SHARE_NEW_COLUMNS = 0.6


@cache
def mixed_domains() -> tuple[Domain, ...]:
    """The mixed schemas, always the same; no word list has a held-out table in it."""
    rng = random.Random("mixed schemas")
    return tuple(_mix(f"{_PREFIX}{i}", rng) for i in range(NUM_MIXED))


def mixed_domain(name: str) -> Domain | None:
    """The mixed schema called `name`, or None if this is no name of one."""
    return next((d for d in mixed_domains() if d.name == name), None) if _PREFIX in name else None


def _mix(name: str, rng: random.Random) -> Domain:
    count = 2 if rng.random() < _SHARE_WITH_TWO_PARENTS else 1
    child, *parents = _names(count + 1, rng)
    columns = _columns(_CHILD_ROWS, rng)
    for parent, _ in parents:
        columns.insert(rng.randint(1, len(columns)), Column(f"{parent}_id", "key", parent))
    tables = [
        Table(parent, many, _PARENT_ROWS, tuple(_columns(_PARENT_ROWS, rng)))
        for parent, many in parents
    ]
    return Domain(name, (*tables, Table(*child, _CHILD_ROWS, tuple(columns))))


def _names(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Different table names with their plurals, a third of them of the training domains."""
    known = {t.name: t.plural for d in domains("train") for t in d.tables if t.title}
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        if rng.random() < _SHARE_NEW_TABLES:
            noun = rng.choice(NOUNS)
            chosen[noun] = plural(noun)
        else:
            noun = rng.choice(list(known))
            chosen[noun] = known[noun]
    return list(chosen.items())


def _columns(num_rows: int, rng: random.Random) -> list[Column]:
    """A title, then one or two categories and one to three quantities, in any order."""
    every = [c for d in domains("train") for t in d.tables for c in t.columns]
    titles = [
        t.title.values
        for d in domains("train")
        for t in d.tables
        if t.title and t.num_rows >= num_rows
    ]
    title = Column(rng.choice(TITLES).replace(" ", "_"), "name", rng.choice(titles))
    chosen: dict[str, Column] = {}
    num_categories, num_quantities = rng.randint(1, 2), rng.randint(1, 3)
    while len(chosen) < num_categories:
        column = _category(every, rng)
        chosen[column.name] = column
    while len(chosen) < num_categories + num_quantities:
        column = _quantity(every, rng)
        chosen[column.name] = column
    chosen.pop(title.name, None)
    columns = list(chosen.values())
    rng.shuffle(columns)
    return [title, *columns]


def _category(every: list[Column], rng: random.Random) -> Column:
    if rng.random() < _SHARE_NEW_COLUMNS:
        name = rng.choice(list(CATEGORIES))
        return Column(name.replace(" ", "_"), "category", CATEGORIES[name])
    return rng.choice([c for c in every if c.kind == "category"])


def _quantity(every: list[Column], rng: random.Random) -> Column:
    if rng.random() >= _SHARE_NEW_COLUMNS:
        return rng.choice([c for c in every if c.is_ordered])
    kind = rng.choice(["integer", "integer", "real", "real", "year", "date"])
    if kind == "year":
        return Column(f"{rng.choice(DATED)}_year", "year", "1900..2023")
    if kind == "date":
        return Column(f"{rng.choice(DATED)}_date", "date", "2010-01-01..2023-12-31")
    if kind == "integer":
        high = rng.choice((30, 400, 9000, 800000, 7000000))
        return Column(f"{rng.choice(COUNTED)}_count", "integer", f"1..{high}")
    measure = rng.choice(MEASURES)
    if rng.random() < 0.5:
        measure = f"{rng.choice(QUALIFIERS)}_{measure}"
    return Column(measure, "real", f"0.5..{rng.choice((9, 80, 700, 5000))}")
