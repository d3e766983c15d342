"""Questions about databases with the SQL that answers them, split by schema."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lorakit.demo import intents, join_intents
from lorakit.demo.database import open_database
from lorakit.demo.domains import Domain, Split, domains
from lorakit.demo.drafts import Draft
from lorakit.demo.mixed import mixed_domains
from lorakit.demo.phrasings import PHRASINGS
from lorakit.demo.query import gold_rows
from lorakit.demo.scene import Scene, UnsuitableError
from lorakit.errors import DataError
from lorakit.evaluate.sql import SqlError, extract_sql, is_ordered, run_sql, same_result

SYSTEM_PROMPT = "Write one SQLite query that answers the question."

INTENTS: dict[str, Callable[[Scene], Draft]] = {
    draw.__name__: draw
    for draw in (
        intents.lookup,
        intents.select_one,
        intents.select_two,
        intents.select_between,
        intents.select_like,
        intents.distinct,
        intents.count,
        intents.count_distinct,
        intents.aggregate,
        intents.order,
        intents.top,
        intents.superlative,
        intents.group_count,
        intents.group_aggregate,
        intents.having,
        join_intents.join_lookup,
        join_intents.join_select,
        join_intents.join_both,
        join_intents.join_count,
        join_intents.join_aggregate,
        join_intents.children_per_parent,
        join_intents.aggregate_per_parent,
        join_intents.most_children,
        join_intents.above_average,
        join_intents.without_children,
    )
}
"""Everything a question can ask, by name."""

# The share of training questions that are about mixed schemas.
_SHARE_MIXED = 0.8
_TWICE = {name for name in INTENTS if name.startswith("join")}
# Draws after which an intent is given up for a database: some have no tie-free answer, for one.
_MAX_DRAWS = 60
# Rounds without a new question after which a split has no more to give.
_MAX_DRY_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one database, and the query that answers it."""

    domain: str
    intent: str
    question: str
    sql: str
    schema_text: str

    def prompt(self) -> str:
        """What the user says: the schema, then the question."""
        return f"{self.schema_text}\n{self.question}"

    def to_row(self) -> dict[str, Any]:
        """The question as a row of chat data, with what an evaluation by execution needs."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": self.prompt()},
                {"role": "assistant", "content": self.sql},
            ],
            "database": f"{self.domain}.sqlite",
            "domain": self.domain,
            "intent": self.intent,
        }


def make_questions(split: Split, n: int, seed: int) -> list[Question]:
    """`n` different questions over the databases of one split, the same for the same seed.

    Databases and intents take turns, so that every intent is asked about equally often. Each query
    was run: its answer is not empty, not a lone 0, free of ties, and every clause changes it.

    Raises:
        DataError: the split's databases do not give that many different questions.
    """
    rng = random.Random(f"questions {split} {seed}")
    found: dict[str, Question] = {}
    dry_rounds = 0
    while len(found) < n:
        before = len(found)
        for intent in _round(split, rng):
            question = _draw(_schema(split, rng), intent, rng)
            if question and len(found) < n:
                found.setdefault(f"{question.domain}: {question.question}", question)
        dry_rounds = dry_rounds + 1 if len(found) == before else 0
        if dry_rounds == _MAX_DRY_ROUNDS:
            raise DataError(
                "the demo's databases do not give so many different questions",
                where=f"split {split!r}",
                expected=f"{n} questions",
                found=f"{len(found)}",
                remedy="ask for fewer",
            )
    return list(found.values())


def conversations(questions: Sequence[Question], turns: int) -> list[dict[str, Any]]:
    """The questions as rows of chat data that show a schema once for up to `turns` answers.

    Questions about the same database become turns of one conversation, in their order; the schema
    stands before the first only. Every answer is there to be learned, for about half the tokens
    that single questions take.
    """
    by_domain: dict[str, list[Question]] = {}
    for question in questions:
        by_domain.setdefault(question.domain, []).append(question)
    rows: list[dict[str, Any]] = []
    for asked in by_domain.values():
        for start in range(0, len(asked), turns):
            first, *others = asked[start : start + turns]
            row = first.to_row()
            del row["intent"]  # there are several
            for question in others:
                row["messages"] += [
                    {"role": "user", "content": question.question},
                    {"role": "assistant", "content": question.sql},
                ]
            rows.append(row)
    return rows


def execution_match(predicted: str, question: Question) -> bool:
    """Whether the query in a model's answer returns what the right query returns.

    The order of rows counts where the right query says ORDER BY, the order of columns always; a
    query that cannot be run, writes or takes too long is wrong.
    """
    connection = _shared_database(question.domain)
    try:
        rows = run_sql(connection, extract_sql(predicted))
    except SqlError:
        return False
    return same_result(rows, run_sql(connection, question.sql), is_ordered(question.sql))


def _round(split: Split, rng: random.Random) -> list[str]:
    names = list(INTENTS)
    if split == "train":
        # Reading two tables is harder than reading one.
        names += [n for n in names if n in _TWICE]
    return rng.sample(names, len(names))


def _schema(split: Split, rng: random.Random) -> Domain:
    mixed = split == "train" and rng.random() < _SHARE_MIXED
    return rng.choice(mixed_domains() if mixed else domains(split))


def _draw(schema: Domain, intent: str, rng: random.Random) -> Question | None:
    scene = Scene(schema, _shared_database(schema.name), rng)
    for _ in range(_MAX_DRAWS):
        try:
            draft = INTENTS[intent](scene)
        except UnsuitableError:
            continue
        if gold_rows(scene.connection, draft.query) is None:
            continue
        text = rng.choice(PHRASINGS[draft.phrasing]).format(**draft.words)
        return Question(schema.name, intent, text, draft.query.sql(), schema.schema_text)
    return None


@cache
def _shared_database(name: str) -> sqlite3.Connection:
    return open_database(name)
