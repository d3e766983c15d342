"""More schemas to train on: tables of the training domains, paired and furnished anew.

A model that sees 29 schemas learns by heart which table owns which column. Here that cannot be
known, only read: tables are linked across domains, and their columns are drawn from all of them.
The questions are as grammatical as ever, if at times odd ("the trains of the doctor Ana Costa").
"""

from __future__ import annotations

import random
from functools import cache

from lorakit.demo.domains import Column, Domain, Table, domains

NUM_MIXED = 240
_PREFIX = "mixed_"
_CHILD_ROWS = 34
_PARENT_ROWS = 15
# How often a child has a second parent.
_SHARE_WITH_TWO_PARENTS = 0.3


@cache
def mixed_domains() -> tuple[Domain, ...]:
    """The mixed schemas, always the same; every word of them is from the training domains."""
    rng = random.Random("mixed schemas")
    return tuple(_mix(f"{_PREFIX}{i}", rng) for i in range(NUM_MIXED))


def mixed_domain(name: str) -> Domain | None:
    """The mixed schema called `name`, or None if this is no name of one."""
    return next((d for d in mixed_domains() if d.name == name), None) if _PREFIX in name else None


def _mix(name: str, rng: random.Random) -> Domain:
    titled = [t for d in domains("train") for t in d.tables if t.title]
    children = [t for t in titled if t.num_rows >= _CHILD_ROWS]
    child = rng.choice(children)
    count = 2 if rng.random() < _SHARE_WITH_TWO_PARENTS else 1
    others = {t.name: t for t in titled if t.name != child.name}
    parents = rng.sample(list(others.values()), count)
    columns = _columns(child, rng)
    for parent in parents:
        place = rng.randint(1, len(columns))
        columns.insert(place, Column(f"{parent.name}_id", "key", parent.name))
    tables = [Table(p.name, p.plural, _PARENT_ROWS, tuple(_columns(p, rng))) for p in parents]
    return Domain(name, (*tables, Table(child.name, child.plural, _CHILD_ROWS, tuple(columns))))


def _columns(table: Table, rng: random.Random) -> list[Column]:
    """The table's own title, then a few categories and quantities of any training table."""
    assert table.title is not None
    others = {
        c.name: c
        for d in domains("train")
        for t in d.tables
        for c in t.columns
        if c.kind not in ("key", "name") and c.name != table.columns[0].name
    }
    categories = [c for c in others.values() if c.kind == "category"]
    quantities = [c for c in others.values() if c.is_ordered]
    chosen = rng.sample(categories, rng.randint(1, 2)) + rng.sample(quantities, rng.randint(1, 3))
    rng.shuffle(chosen)
    return [table.title, *chosen]
