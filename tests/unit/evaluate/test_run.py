from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import tiny_models
from lorakit.adapters.attach import active_adapter, attach
from lorakit.adapters.spec import LoraSpec
from lorakit.data.options import SftOptions
from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import DataError, LorakitWarning, ModelError, StateError
from lorakit.evaluate.generate import generate_answers
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.run import evaluate

PLAIN = SftOptions(template="none")
BOTH = {"base": None, "adapter": "a"}


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    connection = sqlite3.connect(tmp_path / "shop.db")
    connection.executescript("CREATE TABLE item (id INTEGER); INSERT INTO item VALUES (1), (2);")
    connection.commit()
    connection.close()
    lines = [
        {
            "prompt": f"w{i} w{i + 1} ",
            "completion": f"SELECT {i}",
            "choices": [f"SELECT {i}", "bad very", "w3"],
            "database": "shop.db",
        }
        for i in range(8)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_rows(tmp_path / "test.jsonl")


@pytest.fixture
def model(make_llama):
    """A base, and an adapter trained on nothing but different from it."""
    model = make_llama()
    attach(model, LoraSpec(r=3, alpha=9.0, targets="all-linear"), name="a")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model


def teach(model, tokenizer, prompt: str, answer: str) -> None:
    """Overfit adapter `a` to one answer."""
    ids = tokenizer(f"{prompt} {answer} </s>", add_special_tokens=False, return_tensors="pt")
    labels = ids.input_ids.clone()
    labels[:, : len(prompt.split())] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids.input_ids, labels=labels).loss.backward()
        optimizer.step()


def test_every_metric_at_once(model, tokenizer, rows) -> None:
    options = EvalOptions(metrics=tuple(METRICS), max_new_tokens=5, batch_size=3, sft=PLAIN)
    result = evaluate(model, tokenizer, rows, options, systems=BOTH)
    assert result.baseline == "base"
    for system in result.systems.values():
        assert list(system.scores) == list(METRICS)
        assert all(score.n == 8 for score in system.scores.values())
        assert len(system.answers) == len(system.picked) == 8
        assert system.tokens_per_s is not None
        assert system.tokens_per_s > 0
        assert 0 < system.answering_s <= system.seconds
    assert list(result.differences) == ["adapter"]
    assert list(result.differences["adapter"]) == list(METRICS)
    assert active_adapter(model) == "a"

    record = json.loads(json.dumps(result.to_json(max_outputs=2), allow_nan=False))
    assert set(record["systems"]["base"]["scores"]["choice"]) == {"value", "interval", "n"}
    assert set(record["differences"]["adapter"]["bleu"]) == {"value", "interval", "n", "p_value"}
    assert record["metrics"]["perplexity"]["higher_is_better"] is False
    assert len(record["outputs"]) == 2
    assert record["outputs"][1]["origin"] == "test.jsonl line 2"
    assert record["outputs"][1]["prompt"] == "w1 w2"
    assert record["outputs"][1]["question"] == "w1 w2"
    assert len(result.to_json()["outputs"]) == 8


def test_the_numbers_are_those_of_each_system_alone(model, tokenizer, rows) -> None:
    options = EvalOptions(
        metrics=("perplexity", "exact_match"), max_new_tokens=4, batch_size=8, sft=PLAIN
    )
    result = evaluate(model, tokenizer, rows, options, systems=BOTH)
    base = evaluate(model, tokenizer, rows, options, systems={"alone": None})
    adapter = evaluate(model, tokenizer, rows, options, systems={"alone": "a"})
    for name, alone in (("base", base), ("adapter", adapter)):
        assert result.systems[name].scores == alone.systems["alone"].scores
        assert result.systems[name].answers == alone.systems["alone"].answers
    values = [result.systems[n].scores["perplexity"].value for n in ("base", "adapter")]
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    found = result.differences["adapter"]["perplexity"].estimate
    assert found.value == pytest.approx(values[1] - values[0])
    assert alone.differences == {}


def test_a_taught_answer_is_found_by_every_metric(model, tokenizer) -> None:
    row = {"prompt": "w1 w2 ", "completion": "good very w9", "choices": ["bad", "good very w9"]}
    teach(model, tokenizer, "w1 w2", "good very w9")
    options = EvalOptions(
        metrics=("perplexity", "exact_match", "token_f1", "rouge_l", "choice"),
        max_new_tokens=8,
        sft=PLAIN,
    )
    systems = evaluate(model, tokenizer, load_rows([row]), options, systems=BOTH).systems
    taught = {name: score.value for name, score in systems["adapter"].scores.items()}
    assert taught.pop("perplexity") == pytest.approx(1.0, abs=0.1)
    assert set(taught.values()) == {1.0}
    assert systems["adapter"].picked == ["good very w9"]
    assert systems["adapter"].answers[0].finished
    assert systems["base"].scores["exact_match"].value == 0.0
    assert systems["base"].scores["perplexity"].value > 5


def test_answers_belong_to_their_questions(model, tokenizer, rows) -> None:
    options = EvalOptions(metrics=("token_f1",), max_new_tokens=4, batch_size=2, sft=PLAIN)
    result = evaluate(model, tokenizer, rows, options, systems={"adapter": "a"})
    alone = [
        generate_answers(model, tokenizer, [q.prompt_ids], max_new_tokens=4)[0].text
        for q in result.questions
    ]
    assert [answer.text for answer in result.systems["adapter"].answers] == alone
    scores = [answer.scores["token_f1"] for answer in result.systems["adapter"].answers]
    assert result.systems["adapter"].scores["token_f1"].value == pytest.approx(np.mean(scores))


def test_normalised_choices_do_not_favour_short_ones(make_llama, tokenizer) -> None:
    model = make_llama()
    with torch.no_grad():
        # The next token does not depend on the text: w2 and w3 are likelier than all others.
        model.lm_head = torch.nn.Linear(32, 47)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.convert_tokens_to_ids(["w2", "w3"])] = 1.0
    row = {"prompt": "w1 ", "completion": "w2 w3", "choices": ["w2 w3", "w4"]}
    picked = {}
    for how in ("none", "tokens"):
        options = EvalOptions(metrics=("choice",), choice_normalisation=how, sft=PLAIN)
        picked[how] = evaluate(model, tokenizer, load_rows([row]), options).systems["base"].picked
    assert picked == {"none": ["w4"], "tokens": ["w2 w3"]}


def test_all_metrics_see_the_same_limited_rows(model, tokenizer, rows) -> None:
    for metrics in (("perplexity",), ("choice", "perplexity"), ("perplexity", "exact_match")):
        options = EvalOptions(metrics=metrics, limit=3, max_new_tokens=2, sft=PLAIN)
        result = evaluate(model, tokenizer, rows, options)
        assert result.num_rows == 3
        assert {score.n for score in result.systems["base"].scores.values()} == {3}


def test_a_model_without_adapters_is_evaluated(make_llama, tokenizer, rows) -> None:
    options = EvalOptions(metrics=("perplexity",), sft=PLAIN)
    result = evaluate(make_llama(), tokenizer, rows, options)
    assert list(result.systems) == ["base"]
    assert result.systems["base"].tokens_per_s is None


def test_wrong_requests_fail_before_the_model_runs(model, tokenizer, rows, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", refuse)
    options = EvalOptions(metrics=("perplexity", "exact_match"), sft=PLAIN)
    with pytest.raises(StateError):
        evaluate(model, tokenizer, rows, options, systems={"base": None, "adapter": "absent"})
    with pytest.raises(DataError, match="no system"):
        evaluate(model, tokenizer, rows, options, systems={})
    with pytest.raises(DataError, match="empty"):
        evaluate(model, tokenizer, Rows([], [], "none.jsonl"), options)
    for metric in ("perplexity", "choice"):
        one = EvalOptions(metrics=(metric,), sft=PLAIN)
        with pytest.raises(DataError, match="empty"):
            evaluate(model, tokenizer, Rows([], [], "none.jsonl"), one)
    long = load_rows([{"prompt": "w1 " * 70, "completion": "w2"}])
    with pytest.raises(DataError, match="context") as caught:
        evaluate(model, tokenizer, long, EvalOptions(metrics=("exact_match",), sft=PLAIN))
    assert caught.value.where == "row 1"


def test_rows_that_perplexity_leaves_out_are_counted(model, tokenizer) -> None:
    rows = load_rows(
        [{"prompt": "w1 ", "completion": "w2"}, {"prompt": "w1 " * 9, "completion": "w2"}]
    )
    sft = SftOptions(template="none", max_length=6)
    with pytest.warns(LorakitWarning, match="leaves out 1 of 2 rows"):
        result = evaluate(model, tokenizer, rows, EvalOptions(metrics=("perplexity",), sft=sft))
    assert result.systems["base"].scores["perplexity"].n == 1


@pytest.mark.real
def test_a_real_model_knows_a_capital() -> None:
    from lorakit.models.load import load_model

    model, tokenizer = load_model("smollm2-135m-instruct")
    rows = load_rows(
        [
            {
                "prompt": "What is the capital of France?",
                "completion": "The capital of France is Paris.",
                "choices": ["The capital of France is Paris.", "The capital of France is Oslo."],
            }
        ]
    )
    options = EvalOptions(metrics=("exact_match", "perplexity", "choice"), max_new_tokens=16)
    scores = evaluate(model, tokenizer, rows, options).systems["base"].scores
    assert scores["exact_match"].value == 1.0
    assert scores["choice"].value == 1.0
    assert 1.0 < scores["perplexity"].value < 4.0


@pytest.mark.parametrize("metric", ["perplexity", "exact_match", "choice"])
def test_an_encoder_is_refused_before_anything_is_read(tokenizer, metric) -> None:
    model = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4))
    # An empty data set would be the first complaint otherwise.
    with pytest.raises(ModelError, match="no language-modelling head"):
        evaluate(model, tokenizer, Rows([], [], "none.jsonl"), EvalOptions(metrics=(metric,)))


def test_a_model_that_reads_its_answer_is_not_scored_by_likelihood(rows, tokenizer) -> None:
    for model in (tiny_models.t5(), tiny_models.masked_lm()):
        for metric in ("perplexity", "choice"):
            with pytest.raises(ModelError, match="reads what it should predict"):
                evaluate(model, tokenizer, rows, EvalOptions(metrics=(metric,), sft=PLAIN))
