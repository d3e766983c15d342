from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lorakit.data.options import SftOptions
from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError, DataError
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.scoring import SCORERS
from lorakit.evaluate.tasks import Question, build_choices, build_questions, with_answer

PLAIN = SftOptions(template="none")


def options(*metrics: str, **extra) -> EvalOptions:
    return EvalOptions(metrics=metrics or ("exact_match",), sft=PLAIN, **extra)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A data directory with a database in it."""
    connection = sqlite3.connect(tmp_path / "shop.db")
    connection.executescript(
        "CREATE TABLE item (id INTEGER, name TEXT);"
        "INSERT INTO item VALUES (1, 'nut'), (2, 'bolt'), (3, 'gear');"
    )
    connection.commit()
    connection.close()
    return tmp_path


def sql_rows(shop: Path, *rows: str) -> Rows:
    (shop / "test.jsonl").write_text("\n".join(rows) + "\n")
    return load_rows(shop / "test.jsonl")


def test_every_answer_metric_has_its_scorer() -> None:
    assert set(SCORERS) == {name for name, m in METRICS.items() if m.needs == "answers"}


def test_options_refuse_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'rouge'") as caught:
        EvalOptions(metrics=("rouge",))
    assert "rouge_l" in str(caught.value)
    with pytest.raises(ConfigError, match="no metric"):
        EvalOptions(metrics=())
    for name in ("max_new_tokens", "batch_size", "limit"):
        with pytest.raises(ConfigError, match=name):
            EvalOptions(**{name: 0})
    with pytest.raises(ConfigError, match="choice_normalisation"):
        EvalOptions(choice_normalisation="chars")  # pyright: ignore[reportArgumentType]


def test_rows_with_one_prompt_are_one_question_for_corpus_metrics(tokenizer) -> None:
    rows = load_rows(
        [
            {"prompt": "w1", "completion": "w2"},
            {"prompt": "w5", "completion": "w6"},
            {"prompt": "w1", "completion": "w3"},
            {"prompt": "w1", "completion": "w2"},
        ]
    )
    found = build_questions(rows, tokenizer, options("bleu", "exact_match"))
    assert [q.rows for q in found] == [(0, 2, 3), (1,)]
    assert [q.references for q in found] == [("w2", "w3"), ("w6",)]
    assert found[0].prompt_ids == tuple(tokenizer("w1", add_special_tokens=False).input_ids)
    assert len(build_questions(rows, tokenizer, options("exact_match"))) == 4
    assert len(build_questions(rows, tokenizer, options("bleu", group_by_prompt=False))) == 4
    # The limit counts questions; all rows of a question that was taken stay.
    limited = build_questions(rows, tokenizer, options("bleu", limit=1))
    assert [q.rows for q in limited] == [(0, 2, 3)]
    assert len(build_questions(rows, tokenizer, options("exact_match", limit=3))) == 3


def test_a_row_may_carry_its_references(tokenizer) -> None:
    rows = load_rows([{"prompt": "w1", "completion": "w9", "references": ["w2", "w3"]}])
    assert build_questions(rows, tokenizer, options())[0].references == ("w2", "w3")
    for wrong in ([], "w2", [1]):
        rows = load_rows([{"prompt": "w1", "completion": "w9", "references": wrong}])
        with pytest.raises(DataError, match="references") as caught:
            build_questions(rows, tokenizer, options())
        assert caught.value.where == "row 1, column 'references'"


def test_what_a_row_lacks_is_named(tokenizer) -> None:
    rows = load_rows([{"prompt": "w1", "completion": "w2"}, {"prompt": "w1"}])
    with pytest.raises(DataError, match="without an answer") as caught:
        build_questions(rows, tokenizer, options())
    assert caught.value.where == "row 2"
    with pytest.raises(DataError, match="'database'") as caught:
        build_questions(rows[:1], tokenizer, options("sql_execution"))
    assert caught.value.where == "row 1"
    with pytest.raises(DataError, match="'choices'") as caught:
        build_choices(rows, tokenizer, PLAIN)
    assert caught.value.where == "row 1, column 'choices'"
    with pytest.raises(DataError, match="empty"):
        build_questions(Rows([], [], "none.jsonl"), tokenizer, options())


def test_reference_queries_are_run_on_the_database_beside_the_data(shop, tokenizer) -> None:
    rows = sql_rows(
        shop, '{"prompt": "w1", "completion": "SELECT id FROM item;", "database": "shop.db"}'
    )
    question = build_questions(rows, tokenizer, options("sql_execution"))[0]
    assert question.database == shop / "shop.db"
    assert question.reference_results == ([(1,), (2,), (3,)],)


def test_one_prompt_about_two_databases_is_two_questions(shop, tokenizer) -> None:
    (shop / "other.db").write_bytes((shop / "shop.db").read_bytes())
    line = '{"prompt": "w1", "completion": "SELECT id FROM item", "database": "%s"}'
    rows = sql_rows(shop, *(line % name for name in ("shop.db", "other.db", "shop.db")))
    found = build_questions(rows, tokenizer, options("sql_execution", group_by_prompt=True))
    assert [q.rows for q in found] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    ("completion", "database", "match"),
    [
        ("SELECT nothing FROM item", "shop.db", "cannot be run"),
        ("SELECT id FROM item", "absent.db", "no database file"),
        ("SELECT id FROM item", "test.jsonl", "not an SQLite database"),
        ("DROP TABLE item", "shop.db", "refused"),
    ],
)
def test_a_broken_reference_query_is_an_error_in_the_data(
    shop, tokenizer, completion, database, match
) -> None:
    rows = sql_rows(
        shop,
        '{"prompt": "w1", "completion": "SELECT id FROM item", "database": "shop.db"}',
        f'{{"prompt": "w2", "completion": "{completion}", "database": "{database}"}}',
    )
    with pytest.raises(DataError, match=match) as caught:
        build_questions(rows, tokenizer, options("sql_execution"))
    assert caught.value.where == "test.jsonl line 2"


@pytest.mark.parametrize(
    ("reference", "answer", "score", "note"),
    [
        ("SELECT id FROM item", "SELECT id FROM item ORDER BY id DESC", 1.0, ""),
        ("SELECT id FROM item ORDER BY id", "SELECT id FROM item ORDER BY id DESC", 0.0, "other"),
        ("SELECT id FROM item", "So: ```sql\nSELECT item.id FROM item;\n```", 1.0, ""),
        ("SELECT id FROM item", "SELECT name FROM item", 0.0, "other rows"),
        ("SELECT id FROM item", "SELECT idd FROM item", 0.0, "no such column"),
        ("SELECT id FROM item", "DELETE FROM item", 0.0, "refused"),
        ("SELECT id FROM item", "", 0.0, "empty"),
    ],
)
def test_sql_execution(shop, tokenizer, reference, answer, score, note) -> None:
    rows = sql_rows(shop, f'{{"prompt": "w1", "completion": "{reference}", "database": "shop.db"}}')
    questions = build_questions(rows, tokenizer, options("sql_execution"))
    scored = SCORERS["sql_execution"](questions, [answer])
    assert scored.scores == [score]
    assert scored.notes[0].startswith(note) or note in scored.notes[0]


def test_any_reference_query_will_do(shop, tokenizer) -> None:
    rows = sql_rows(
        shop,
        '{"prompt": "w1", "database": "shop.db",'
        ' "references": ["SELECT id FROM item", "SELECT max(id) FROM item"], "completion": "x"}',
    )
    questions = build_questions(rows, tokenizer, options("sql_execution"))
    assert SCORERS["sql_execution"](questions, ["SELECT 3"]).scores == [1.0]


def test_mean_metrics_keep_the_order_of_the_answers() -> None:
    questions = [Question((i,), f"row {i}", (5,), (r,)) for i, r in enumerate(["w1 w2", "w3"])]
    for name, expected in (
        ("exact_match", [0.0, 1.0]),
        ("token_f1", [2 / 3, 1.0]),
        ("rouge_l", [2.44 * 0.5 / (0.5 + 1.44), 1.0]),
    ):
        scored = SCORERS[name](questions, ["w1", "w3"])
        assert scored.scores == pytest.approx(expected)
        assert scored.sample.value() == pytest.approx(sum(expected) / 2)


def test_choices_become_examples_that_end_with_eos(tokenizer) -> None:
    rows = load_rows(
        [
            {"prompt": "w1 ", "completion": "good", "choices": ["bad", "good"]},
            {"prompt": "w2 ", "completion": "w4", "choices": ["w3", "very", "w4"]},
        ]
    )
    found = build_choices(rows, tokenizer, SftOptions(template="none", max_length=2))
    assert found.right == [1, 2]
    assert found.origins[3] == "row 2, choice 2"
    shown = [tokenizer.decode([t for t in e.labels if t != -100]) for e in found.examples]
    assert shown == ["bad</s>", "good</s>", "w3</s>", "very</s>", "w4</s>"] or shown == [
        f"{c} </s>" for c in ("bad", "good", "w3", "very", "w4")
    ]


@pytest.mark.parametrize("choices", [["good"], [], ["good", "good"], ["good", ""], "good", [1, 2]])
def test_choices_that_cannot_be(tokenizer, choices) -> None:
    rows = load_rows([{"prompt": "w1", "completion": "good", "choices": choices}])
    with pytest.raises(DataError, match="choices that cannot be"):
        build_choices(rows, tokenizer, PLAIN)


def test_the_answer_must_be_among_the_choices(tokenizer) -> None:
    rows = load_rows([{"prompt": "w1", "completion": "w7", "choices": ["good", "bad"]}])
    with pytest.raises(DataError, match="not one of its choices") as caught:
        build_choices(rows, tokenizer, PLAIN)
    assert caught.value.where == "row 1"


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, "completion", "x"),
        ({"instruction": "i", "input": "j", "output": "o"}, "output", "x"),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": []},
            "completion",
            [{"role": "assistant", "content": "x"}],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "messages",
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}],
        ),
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
            "conversations",
            [{"from": "human", "value": "p"}, {"from": "gpt", "value": "x"}],
        ),
        (
            {"conversations": [{"from": "Human", "value": "p"}, {"from": "bot", "value": "c"}]},
            "conversations",
            [{"from": "Human", "value": "p"}, {"from": "gpt", "value": "x"}],
        ),
    ],
)
def test_with_answer_in_every_format(row, column, expected) -> None:
    before = repr(row)
    assert with_answer(row, "x", SftOptions(), where="row 1")[column] == expected
    assert repr(row) == before


def test_plain_text_has_no_answer() -> None:
    with pytest.raises(DataError, match="no answer"):
        with_answer({"text": "t"}, "x", SftOptions(), where="row 1")
