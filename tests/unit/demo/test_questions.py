"""Questions for SQL: the same for a seed, split by schema, each query worth asking."""

from __future__ import annotations

import string
from collections import Counter

import pytest

import lorakit.demo.questions as module
from lorakit.demo.database import open_database
from lorakit.demo.domains import Split, domains
from lorakit.demo.mixed import mixed_domains
from lorakit.demo.phrasings import PHRASINGS
from lorakit.demo.questions import (
    INTENTS,
    Question,
    conversations,
    execution_match,
    make_questions,
)
from lorakit.demo.words import NOUNS
from lorakit.errors import DataError
from lorakit.evaluate.sql import is_ordered, run_sql

SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [q for split in SPLITS for q in make_questions(split, 200, 3)]


def _ask(domain: str, intent: str) -> Question:
    # Databases and intents are drawn: ask until this pair has come up.
    for seed in range(20):
        for question in make_questions("validation", 300, seed):
            if (question.domain, question.intent) == (domain, intent):
                return question
    raise AssertionError(f"no {intent} question about {domain}")


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    first = make_questions("train", 60, 5)
    assert first == make_questions("train", 60, 5)
    assert first != make_questions("train", 60, 6)


def test_more_questions_begin_with_the_same_ones() -> None:
    assert make_questions("train", 80, 5)[:40] == make_questions("train", 40, 5)


def test_splits_share_no_schema() -> None:
    names = {split: {d.name for d in domains(split)} for split in SPLITS}
    schemas = {split: {d.schema_text for d in domains(split)} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        assert not names[one] & names[other]
        assert not schemas[one] & schemas[other]


def test_no_table_is_both_learned_and_held_out() -> None:
    learned = {t.name for d in domains("train") for t in d.tables}
    held_out = {t.name for d in domains("held_out") for t in d.tables}
    assert not learned & held_out


def test_mixed_schemas_are_for_training_and_have_no_table_of_another_split() -> None:
    kept_apart = {t.name for split in SPLITS[1:] for d in domains(split) for t in d.tables}
    assert not kept_apart & set(NOUNS)
    real = {d.name for d in domains("train")}
    for schema in mixed_domains():
        assert schema.name not in real
        assert 2 <= len(schema.tables) <= 3
        for table in schema.tables:
            assert table.name not in kept_apart
            assert len({c.name for c in table.columns}) == len(table.columns) >= 3
    mixed = {d.name for d in mixed_domains()}
    asked = {q.domain for q in make_questions("train", 300, 0)}
    assert asked & real
    assert asked & mixed
    assert asked <= real | mixed
    for split in SPLITS[1:]:
        assert not {q.domain for q in make_questions(split, 100, 0)} & mixed


def test_mixed_schemas_are_worth_asking_about() -> None:
    for schema in mixed_domains():
        connection = open_database(schema.name)
        for table in schema.tables:
            (count,) = connection.execute(f"SELECT COUNT(*) FROM {table.name}").fetchone()
            assert count == table.num_rows


def test_questions_stay_in_the_domains_of_their_split() -> None:
    known = {d.name for d in domains("held_out")}
    assert {q.domain for q in make_questions("held_out", 160, 0)} == known


def test_no_question_is_asked_twice(questions: list[Question]) -> None:
    asked = Counter((q.domain, q.question) for q in questions)
    assert max(asked.values()) == 1


def test_every_intent_is_asked_about_as_often_as_every_other() -> None:
    counts = Counter(q.intent for q in make_questions("held_out", 200, 0))
    assert set(counts) == set(INTENTS)
    assert min(counts.values()) >= 3
    assert max(counts.values()) <= 10


def test_every_intent_has_at_least_four_phrasings_with_the_same_gaps() -> None:
    for phrasings in PHRASINGS.values():
        assert len(set(phrasings)) >= 4


def test_no_gap_is_left_open(questions: list[Question]) -> None:
    for question in questions:
        assert "{" not in question.question
        assert "  " not in question.question
        assert question.question[0] in string.ascii_uppercase
        assert question.question[-1] in ".?"


def test_every_query_runs_and_its_answer_is_not_trivial(questions: list[Question]) -> None:
    for question in questions:
        rows = run_sql(open_database(question.domain), question.sql)
        assert rows
        assert rows not in ([(None,)], [(0,)])


def test_an_answer_with_an_order_has_one_right_order(questions: list[Question]) -> None:
    ordered = [q for q in questions if is_ordered(q.sql) and q.intent in ("order", "top")]
    assert len(ordered) > 20
    for question in ordered:
        body, _, tail = question.sql.partition(" ORDER BY ")
        key, limit = tail.removesuffix(" DESC").split(" LIMIT ")[0].split()[0], question.sql
        keys = run_sql(
            open_database(question.domain),
            f"SELECT {key} FROM {body.split(' FROM ')[1]} ORDER BY {tail.split(' LIMIT ')[0]}",
        )
        shown = int(limit.rsplit(" ", 1)[1]) + 1 if " LIMIT " in limit else len(keys)
        assert len(set(keys[:shown])) == len(keys[:shown]), question.sql


def test_leaving_out_the_condition_changes_the_answer(questions: list[Question]) -> None:
    filtered = [q for q in questions if q.intent in ("select_one", "count", "join_count")]
    assert len(filtered) > 40
    for question in filtered:
        everything = question.sql.split(" WHERE ")[0]
        assert not execution_match(everything, question), question.sql


def test_asking_for_more_questions_than_there_are_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "INTENTS", {"distinct": INTENTS["distinct"]})
    with pytest.raises(DataError, match="so many different questions") as caught:
        make_questions("validation", 1000, 0)
    assert caught.value.expected == "1000 questions"


def test_a_row_is_a_chat_with_the_schema_and_the_answer() -> None:
    question = make_questions("train", 1, 0)[0]
    row = question.to_row()
    roles = [m["role"] for m in row["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert row["messages"][1]["content"].startswith(question.schema_text)
    assert row["messages"][1]["content"].endswith(question.question)
    assert row["messages"][2]["content"] == question.sql
    assert row["database"] == f"{question.domain}.sqlite"


def test_a_conversation_shows_a_schema_once_and_loses_no_question() -> None:
    asked = make_questions("train", 300, 0)
    rows = conversations(asked, 3)
    said = [m for row in rows for m in row["messages"]]
    assert sorted(m["content"] for m in said if m["role"] == "assistant") == sorted(
        q.sql for q in asked
    )
    assert {len(row["messages"]) for row in rows} == {3, 5, 7}
    by_sql = {(q.domain, q.sql, q.question): q for q in asked}
    for row in rows:
        system, first, *rest = row["messages"]
        assert system["role"] == "system"
        question = by_sql[row["domain"], rest[0]["content"], first["content"].split("\n")[-1]]
        assert first["content"] == question.prompt()
        for user, answer in zip(rest[1::2], rest[2::2], strict=True):
            assert (user["role"], answer["role"]) == ("user", "assistant")
            assert (row["domain"], answer["content"], user["content"]) in by_sql


def test_the_right_query_matches_in_any_packing(questions: list[Question]) -> None:
    for question in questions[:50]:
        assert execution_match(question.sql, question)
        assert execution_match(f"Sure:\n```sql\n{question.sql};\n```", question)
        assert execution_match(f"{question.sql};", question)


def test_an_equivalent_query_matches() -> None:
    question = _ask("museum", "count")
    table = question.sql.split(" FROM ")[1].split(" ")[0]
    assert execution_match(question.sql.replace("COUNT(*)", f"count({table}.id)"), question)


def test_the_order_of_rows_counts_only_where_it_was_asked_for() -> None:
    for q in make_questions("held_out", 200, 0):
        if q.intent == "select_one" and len(run_sql(open_database(q.domain), q.sql)) > 3:
            assert execution_match(f"{q.sql} ORDER BY id DESC", q)
        if q.intent == "order":
            swapped = q.sql.removesuffix(" DESC") if q.sql.endswith("DESC") else q.sql + " DESC"
            assert not execution_match(swapped, q)


def test_the_order_of_columns_counts() -> None:
    question = _ask("winery", "group_count")
    columns, rest = question.sql.removeprefix("SELECT ").split(" FROM ")
    first, second = columns.split(", ")
    assert not execution_match(f"SELECT {second}, {first} FROM {rest}", question)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know.",
        "SELECT nothing FROM nowhere",
        "DELETE FROM wine",
        "DROP TABLE wine",
        "INSERT INTO wine (label) VALUES ('x') RETURNING label",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
    ],
)
def test_a_broken_writing_or_endless_query_does_not_match(answer: str) -> None:
    question = _ask("winery", "count")
    assert not execution_match(answer, question)
    assert execution_match(question.sql, question)  # the database is as it was


def test_a_wrong_column_table_or_value_does_not_match() -> None:
    question = _ask("winery", "select_one")
    body, condition = question.sql.split(" WHERE ")
    assert not execution_match(f"{body} WHERE NOT ({condition})", question)
    assert not execution_match(f"{body} WHERE id > 0 OR {condition}", question)
    assert not execution_match(f"SELECT id FROM {body.split(' FROM ')[1]}", question)
