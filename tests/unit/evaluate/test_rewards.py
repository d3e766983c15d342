"""What an answer earns: metrics of one answer, functions of the user's own, what they break."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tiny_runs
from lorakit.data.options import SftOptions
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError, DataError, TrainingError
from lorakit.evaluate.options import METRICS, SINGLE_METRICS
from lorakit.evaluate.rewards import Rewards, load_function
from lorakit.evaluate.scoring import SCORERS

FUNCTIONS = """
import numpy
import torch

def length(answer, row):
    return len(answer.split()) / row["most"]

def broken(answer, row):
    return 1 / answer.count("x")

def endless(answer, row):
    return float("inf")

def nothing(answer, row):
    return None

def texts(answer, row):
    return "1.0"

def several(answer, row):
    return torch.ones(2)

def leaves(answer, row):
    raise SystemExit(3)

def of_numpy(answer, row):
    return numpy.float32(len(answer))

def of_torch(answer, row):
    return torch.tensor(len(answer))

def one(answer):
    return 1.0
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_runs.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "w1 w2", "completion": "w3 w4", "most": 4, "database": "d.sqlite"}\n'
        '{"prompt": "w5", "completion": "SELECT b FROM t", "most": 2, "database": "d.sqlite"}\n'
    )
    with sqlite3.connect(tmp_path / "d.sqlite") as connection:
        connection.execute("CREATE TABLE t (a, b)")
        connection.execute("INSERT INTO t VALUES (1, 2)")
    connection.close()
    return tmp_path


def test_weighted_rewards(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rewards = Rewards({"token_f1": 0.5, f"{place / 'own.py'}:length": 2.0})
    asked = rewards.ask(load_rows(place / "rows.jsonl"), tokenizer, SftOptions(), label="reading")
    assert [len(one.prompt_ids) for one in asked] == [2, 1]
    every = [asked[0], asked[0], asked[1]]
    found = rewards.score(every, ["w3 w4", "w3 w9 w9 w9", "select"])
    # F1 of one of two words against four: 2 * 1 / 6.
    assert found == pytest.approx([0.5 + 2 * 0.5, 0.5 / 3 + 2.0, 0.5 * 0.4 + 2 * 0.5])


def test_sql_is_executed(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rewards = Rewards({"sql_execution": 1.0})
    rows = load_rows(place / "rows.jsonl")
    with pytest.raises(DataError, match="reference query"):
        rewards.ask(rows, tokenizer, SftOptions(), label="reading")
    asked = rewards.ask(rows[1:], tokenizer, SftOptions(), label="reading") * 3
    answers = ["SELECT a + 1 FROM t", "SELECT a FROM t", "no query"]
    assert rewards.score(asked, answers) == [1.0, 0.0, 0.0]


def test_rows_need_no_answer_where_no_metric_compares(
    tmp_path: Path, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "bare.jsonl").write_text('{"prompt": "w1", "most": 5}\n')
    rows = load_rows(tmp_path / "bare.jsonl")
    own = Rewards({f"{place / 'own.py'}:length": 1.0})
    asked = own.ask(rows, tokenizer, SftOptions(), label="reading")
    assert own.score(asked, ["w1 w2"]) == [0.4]
    with pytest.raises(DataError, match="without an answer"):
        Rewards({"exact_match": 1.0}).ask(rows, tokenizer, SftOptions(), label="reading")


@pytest.mark.parametrize(
    ("name", "answer", "what"),
    [
        ("broken", "w1", "failed"),
        ("endless", "w1", "not a finite number"),
        ("nothing", "w1", "not a finite number"),
        ("texts", "w1", "not a finite number"),
        ("several", "w1", "not a finite number"),
        ("leaves", "w1", "failed"),
    ],
)
def test_a_function_that_fails_names_the_row(
    place: Path, tokenizer: PreTrainedTokenizerBase, name: str, answer: str, what: str
) -> None:
    rewards = Rewards({f"{place / 'own.py'}:{name}": 1.0})
    rows = load_rows(place / "rows.jsonl")
    asked = rewards.ask(rows, tokenizer, SftOptions(), label="reading")
    with pytest.raises(TrainingError, match=what) as error:
        rewards.score(asked[1:], [answer])
    assert "rows.jsonl line 2" in str(error.value)
    assert name in str(error.value)


def test_numbers_of_other_libraries_are_numbers(
    place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = load_rows(place / "rows.jsonl")
    for name in ("of_numpy", "of_torch"):
        rewards = Rewards({f"{place / 'own.py'}:{name}": 1.0})
        asked = rewards.ask(rows, tokenizer, SftOptions(), label="reading")
        assert rewards.score(asked[:1], ["w1"]) == [2.0]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("missing.py:f", "cannot be imported"),
        ("no_such_module_here:f", "cannot be imported"),
        ("own.py:lenght", "has no function"),
        ("own.py:one", "no reward function"),
        ("bad.py:f", "cannot be imported"),
    ],
)
def test_functions_that_cannot_be_loaded(place: Path, name: str, what: str) -> None:
    (place / "bad.py").write_text("def f(:")
    where = str(place / name) if ".py" in name else name
    with pytest.raises(ConfigError, match=what):
        load_function(where)
    assert load_function("math:fmod") is not None


def test_single_metrics_score_an_answer_alone_as_among_others() -> None:
    assert set(SINGLE_METRICS) <= {n for n, m in METRICS.items() if m.needs == "answers"}
    for name in SINGLE_METRICS:
        assert name in SCORERS
