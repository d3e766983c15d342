"""Scores of a comparison beside the paper's, from numbers made up to be told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorakit.compare.config import CompareConfig
from lorakit.paper.comparisons import comparison
from lorakit.paper.experiments import EXPERIMENTS
from lorakit.paper.scores import (
    paper_numbers,
    score_findings,
    score_table,
    text_table,
    value_of,
)


def cell(arm: str, seed: int, bleu: float, half: float, *, kind: str = "final") -> dict[str, Any]:
    score = {"value": bleu, "interval": [bleu - half, bleu + half], "n": 60}
    return {
        "arm": arm,
        "kind": kind,
        "seed": seed,
        "failed": None,
        "eval_loss": 2 * bleu,
        "scores": {"bleu": score, "nist": {**score, "interval": None}},
    }


def document(cells: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(c["arm"] for c in cells)
    return {
        "config": {"eval": {"metrics": ["bleu", "nist", "rouge_l"]}},
        "cells": cells,
        "methods": [{"name": name, "trainable_params": 1000 * len(name)} for name in names],
    }


LORA = "LoRA r=4 q,v"


def test_a_value_has_the_spread_of_rows_and_seeds() -> None:
    found = value_of(
        document([cell(LORA, 0, 0.60, 0.03), cell(LORA, 1, 0.68, 0.03)]), LORA, "bleu", 100
    )
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(64.0), 2)
    assert found.spread == pytest.approx(math.hypot(3.0, 4.0))
    one = value_of(document([cell(LORA, 0, 0.6, 0.03)]), LORA, "nist", 1)
    assert one is not None
    assert one.spread == 0.0
    loss = value_of(document([cell(LORA, 0, 0.6, 0.03)]), LORA, "eval_loss", 1)
    assert loss is not None
    assert loss.value == pytest.approx(1.2)


def test_search_runs_and_failed_runs_do_not_count() -> None:
    failed = {**cell(LORA, 1, 0.9, 0.1), "failed": "nan"}
    found = value_of(
        document([cell(LORA, 0, 0.6, 0.0), failed, cell(LORA, 0, 0.1, 0.0, kind="search")]),
        LORA,
        "bleu",
        100,
    )
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(60.0), 1)
    assert value_of(document([failed]), LORA, "bleu", 100) is None


def test_claims_are_of_methods_that_ran_and_stand_beside_the_paper() -> None:
    documents = {"e2e": document([cell(LORA, 0, 0.60, 0.01), cell("full", 0, 0.70, 0.01)])}
    found = score_findings("table3", documents)
    # CIDEr was not asked for; ROUGE-L was, and no run has it.
    assert [f.claim.rpartition(", ")[2] for f in found] == ["BLEU", "NIST", "ROUGE-L"]
    assert found[0].verdict == "disagrees"
    assert "70.4" in found[0].paper
    assert "68.2" in found[0].paper
    assert found[2].verdict == "cannot tell"
    assert "not measured" in found[2].ours


def test_the_table_has_ours_and_the_papers_side_by_side() -> None:
    documents = {"e2e": document([cell(LORA, 0, 0.601, 0.01), cell("mine", 0, 0.7, 0.01)])}
    table = text_table(score_table("table3", documents))
    assert table["columns"][:4] == ["method", "trained", "BLEU", "paper: BLEU"]
    assert table["rows"][0][:4] == [LORA, "12,000", "60.1 ± 1", "70.4 ± 0.1"]
    assert table["rows"][0][-1] == "M LoRA (0.35M)"
    # A method that the paper does not have stands alone.
    assert table["rows"][1][3] == "–"
    assert table["rows"][1][-1] == "–"
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}


@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if e.kind == "compare"])
def test_every_row_and_column_of_the_numbers_is_one_of_the_comparison(name: str) -> None:
    numbers, parts = paper_numbers()[name], EXPERIMENTS[name].parts
    for scale in EXPERIMENTS[name].scales.values():
        arms = {part.config: comparison(part, scale) for part in parts}
        assert {c["part"] for c in numbers["columns"]} == set(arms)
        whole = {arm.name for config in arms.values() for arm in config.arms}
        claimed = {name for pair in numbers["claims"] for name in pair}
        assert claimed <= set(numbers["rows"])
        assert claimed & whole
        for column in numbers["columns"]:
            measured = arms[column["part"]].eval.metrics
            assert column["metric"] in (*measured, "eval_loss")
            assert all(column["paper"] in row["values"] for row in numbers["rows"].values())
    assert set(numbers["rows"]) <= {
        arm.name for part in parts for arm in CompareConfig.from_yaml(part.file).arms
    }
