"""The scores of comparisons beside the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from lorakit.formatting import format_count
from lorakit.paper.findings import Finding, Value, compare_order
from lorakit.train.yaml import read_mapping

NUMBERS = Path(__file__).parent / "numbers.yaml"
_NONE = "–"
Documents = Mapping[str, Mapping[str, Any]]


@lru_cache(maxsize=1)
def paper_numbers() -> dict[str, Any]:
    """What the paper measured, by experiment; see the head of numbers.yaml."""
    return read_mapping(NUMBERS)


def value_of(document: Mapping[str, Any], arm: str, metric: str, factor: float) -> Value | None:
    """A method's score: the mean over its seeds, and how far rows and seeds leave it open.

    The spread is sqrt(rows^2 + seeds^2): rows is half the 95 % interval over the test rows (the
    mean over the seeds, which saw the same rows), seeds half the range over the seeds.

    Args:
        document: what compare.json says.
        arm: the method's name.
        metric: one of its scores, or eval_loss.
        factor: to the unit that is wanted.

    Returns:
        None where no run of the method finished.
    """
    final = [
        cell
        for cell in document["cells"]
        if (cell["arm"], cell["kind"]) == (arm, "final") and not cell["failed"]
    ]
    if metric == "eval_loss":
        values = [cell["eval_loss"] for cell in final if cell["eval_loss"] is not None]
        widths: list[float] = []
    else:
        scores = [cell["scores"][metric] for cell in final if metric in cell["scores"]]
        values = [score["value"] for score in scores]
        widths = [
            (score["interval"][1] - score["interval"][0]) / 2
            for score in scores
            if score["interval"]
        ]
    if not values:
        return None
    rows = mean(widths) if widths else 0.0
    seeds = (max(values) - min(values)) / 2
    return Value(
        value=factor * mean(values), spread=factor * math.hypot(rows, seeds), n=len(values)
    )


def score_table(name: str, documents: Documents) -> dict[str, Any]:
    """Every method of an experiment, ours beside the paper's.

    Args:
        name: of the experiment.
        documents: name of a comparison -> its compare.json.
    """
    numbers = paper_numbers()[name]
    columns = _measured(numbers["columns"], documents)
    arms = {m["name"]: m for document in documents.values() for m in document["methods"]}
    rows: list[dict[str, Any]] = []
    for arm, method in arms.items():
        row = numbers["rows"].get(arm)
        cells: dict[str, Any] = {}
        for column in columns:
            found = _ours(documents, arm, column)
            theirs = None if row is None else _paper(row, column)
            cells[column["label"]] = {
                "ours": None if found is None else _plain(found),
                "paper": None if theirs is None else _plain(theirs),
            }
        rows.append(
            {
                "name": arm,
                "trained": method["trainable_params"],
                "paper_name": None if row is None else row["paper"],
                "paper_trained": None if row is None else row["trained"],
                "cells": cells,
            }
        )
    return {
        "columns": [{"label": c["label"], "paper": c["paper"]} for c in columns],
        "rows": rows,
    }


def score_findings(name: str, documents: Documents) -> list[Finding]:
    """The paper's order of two methods beside ours, in every column; only of methods that ran."""
    numbers = paper_numbers()[name]
    found: list[Finding] = []
    for first, second in numbers["claims"]:
        for column in _measured(numbers["columns"], documents):
            names = {method["name"] for method in documents[column["part"]]["methods"]}
            if not {first, second} <= names:
                continue
            ours = _ours(documents, first, column), _ours(documents, second, column)
            known = (ours[0], ours[1]) if ours[0] and ours[1] else None
            theirs = (
                _paper(numbers["rows"][first], column),
                _paper(numbers["rows"][second], column),
            )
            found.append(
                compare_order(_claim(first, second, column), (first, second), theirs, known)
            )
    return found


def text_table(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The table as text: ours with its spread and the paper's beside it, column by column."""
    columns = ["method", "trained"]
    for column in scores["columns"]:
        columns += [column["label"], f"paper: {column['paper']}"]
    columns.append("paper's row")
    rows: list[list[str]] = []
    for row in scores["rows"]:
        trained = _NONE if row["trained"] is None else format_count(row["trained"])
        cells = [row["name"], trained]
        for cell in row["cells"].values():
            cells += [_text(cell["ours"]), _text(cell["paper"])]
        paper = row["paper_name"]
        rows.append([*cells, _NONE if paper is None else f"{paper} ({row['paper_trained']})"])
    return {"columns": columns, "rows": rows}


def _text(cell: Mapping[str, Any] | None) -> str:
    return _NONE if cell is None else Value(**cell).text()


def _measured(columns: list[dict[str, Any]], documents: Documents) -> list[dict[str, Any]]:
    """The columns that the comparisons were asked to measure."""
    return [
        column
        for column in columns
        if column["part"] in documents
        and column["metric"]
        in ("eval_loss", *documents[column["part"]]["config"]["eval"]["metrics"])
    ]


def _claim(first: str, second: str, column: Mapping[str, Any]) -> str:
    of_paper = "" if column["paper"] == column["label"] else f" (the paper: {column['paper']})"
    lower = ", lower is better" if column.get("lower") else ""
    return f"{first} against {second}, {column['label']}{of_paper}{lower}"


def _ours(documents: Documents, arm: str, column: Mapping[str, Any]) -> Value | None:
    return value_of(documents[column["part"]], arm, column["metric"], column["factor"])


def _paper(row: Mapping[str, Any], column: Mapping[str, Any]) -> Value:
    label = column["paper"]
    spread = row.get("spread", {}).get(label, column.get("spread", 0.0))
    return Value(value=row["values"][label], spread=spread)


def _plain(value: Value) -> dict[str, Any]:
    return {"value": value.value, "spread": value.spread, "n": value.n}
