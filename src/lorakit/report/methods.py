"""The sections of a comparison of methods, from the plain values of compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_estimate,
    format_number,
    format_share,
)
from lorakit.report.schema import MethodCurve, MethodPoint, MethodTable, Report, Tile

_NONE = "–"
_LOSS = "validation loss"
# Metrics that are fractions of something, written in percent.
_NOT_SHARES = ("loss", "perplexity", "nist", "cider")


def methods_report(record: Mapping[str, Any]) -> Report:
    """The whole report of a comparison."""
    config = record["config"]
    report: Report = {
        "title": str(record["title"]),
        "subtitle": _subtitle(record),
        "tiles": _tiles(record),
        "methods": methods_table(record),
        "method_curves": _curves(record),
        "details": {
            "Budget": {key: value for key, value in config["budget"].items() if value is not None},
            "Learning-rate search": dict(config["lr_search"]),
            "Score": dict(config["eval"]),
            "Rows": dict(record["data"]["num_rows"]),
            "Hardware": dict(record["hardware"]),
            "Versions": dict(record["versions"]),
        },
        "command": str(record["command"]),
    }
    metric = record["metric"]
    if metric is not None:
        direction = "higher" if metric["higher_is_better"] else "lower"
        report["method_plot"] = {
            "metric": f"{_words(metric['name'])} ({direction} is better)",
            "points": _points(record, metric["name"]),
        }
    return report


def methods_table(record: Mapping[str, Any]) -> MethodTable:
    """One row per method, formatted for a terminal or a page."""
    metrics = list(dict.fromkeys(name for m in record["methods"] for name in m["scores"]))
    columns = ["method", "trained", "share", *map(_words, metrics)]
    if metrics:
        columns += ["median", "n"]
    columns += ["lr", "peak memory", "above base", "tokens/s", "examples/s", "saved"]
    columns += ["latency", "merged"]
    rows = [_row(method, metrics) for method in record["methods"]]
    return {"columns": columns, "rows": rows, "note": " ".join(_remarks(record))}


def _row(method: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    cells = [
        method["name"],
        _or_none(method["trainable_params"], format_count),
        _or_none(method["trainable_share"], format_share),
    ]
    for name in metrics:
        score = method["scores"].get(name)
        cells.append(_NONE if score is None else format_estimate(score, share=is_share(name)))
    if metrics:
        first = method["scores"].get(metrics[0])
        cells.append(_NONE if first is None else format_score(first["median"], metrics[0]))
        cells.append(_NONE if first is None else str(first["n"]))
    memory, speed, lr = method["memory"], method["speed"], method["lr"]
    rate = _or_none(lr["chosen"], lambda value: f"{value:g}")
    latency = method["latency"] or {}
    return [
        *cells,
        f"{rate}*" if lr["edge"] else rate,
        _or_none(memory["peak_bytes"], format_bytes),
        _or_none(memory["above_base_bytes"], format_bytes),
        _or_none(speed["tokens_per_s"], format_count),
        _or_none(speed["examples_per_s"], format_number),
        _or_none(method["checkpoint_bytes"], format_bytes),
        _ratio(latency.get("unmerged")),
        _ratio(latency.get("merged")),
    ]


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing rows."""
    remarks = [
        "Scores: mean over seeds with its 95 % t-interval; n seeds.",
        "Latency: one forward pass over the base's, median of alternating pairs.",
    ]
    for method in record["methods"]:
        lr = method["lr"]
        if lr["edge"]:
            remarks.append(
                f"* {method['name']}: the chosen lr is the {lr['edge']} of those tried; a better "
                "one may lie beyond."
            )
        remarks += [
            f"{method['name']}: lr {run['lr']:g} won the search and did not hold over the whole "
            f"run ({_validated(run)}): the next best was tried."
            for run in lr.get("abandoned", ())
        ]
        if method.get("together"):
            remarks.append(
                f"{method['name']}: {method['together']} of the runs were trained together with "
                "others, each equal to its run alone; their memory and speed are shared and not in "
                "the table."
            )
        refused = ((method["latency"] or {}).get("merged") or {}).get("refused")
        if refused:
            remarks.append(f"{method['name']} cannot be merged: {refused}.")
        remarks += [
            f"{failure['cell']} failed: {failure['what']}." for failure in method["failures"]
        ]
    if not record["complete"]:
        cells = record["num_cells"]
        remarks.append(f"Not complete: {cells['finished']} of {cells['planned']} cells.")
    return remarks


def _validated(run: Mapping[str, Any]) -> str:
    """The validation loss of a run, and the metric that decides where that is another one."""
    shown = [f"{_LOSS} {_or_none(run['eval_loss'], format_number)}"]
    by = run.get("by") or _LOSS
    if by != _LOSS:
        shown.insert(0, f"{by} {format_score(run['value'], by)}")
    return ", ".join(shown)


def _chosen_by(record: Mapping[str, Any]) -> str:
    runs = [run for method in record["methods"] for run in method["lr"]["searched"]]
    return " or ".join(sorted({run.get("by") or _LOSS for run in runs})) or _LOSS


def _subtitle(record: Mapping[str, Any]) -> str:
    config = record["config"]
    budget = ", ".join(
        f"{format_number(value)} {key}"
        for key, value in config["budget"].items()
        if value is not None and key != "probe_steps"
    )
    seeds = len(config["seeds"])
    return (
        f"{len(record['methods'])} methods, {budget} each, {seeds} seed{'s' * (seeds > 1)}; "
        f"learning rates chosen by {_chosen_by(record)}"
    )


def _tiles(record: Mapping[str, Any]) -> list[Tile]:
    cells = record["num_cells"]
    tiles: list[Tile] = [
        {"label": "cells", "value": f"{cells['finished']} of {cells['planned']}"},
        {"label": "time of all cells", "value": format_duration(record["seconds"]["all_cells"])},
    ]
    metric = record["metric"]
    scored = [m for m in record["methods"] if metric and metric["name"] in m["scores"]]
    if metric and scored:
        sign = 1 if metric["higher_is_better"] else -1
        best = max(scored, key=lambda m: sign * m["scores"][metric["name"]]["value"])
        value = best["scores"][metric["name"]]["value"]
        tiles.append(
            {
                "label": f"best mean {_words(metric['name'])}",
                "value": format_score(value, metric["name"]),
                "note": best["name"],
            }
        )
    return tiles


def _points(record: Mapping[str, Any], metric: str) -> list[MethodPoint]:
    return [
        {
            "name": method["name"],
            "method": method["method"],
            "trainable_params": method["trainable_params"],
            "score": method["scores"][metric],
        }
        for method in record["methods"]
        if metric in method["scores"] and method["trainable_params"]
    ]


def _curves(record: Mapping[str, Any]) -> list[MethodCurve]:
    curves: list[MethodCurve] = []
    for method in record["methods"]:
        runs = [
            cell["eval_curve"]
            for cell in record["cells"]
            if cell["arm"] == method["name"] and cell["kind"] == "final" and cell["eval_curve"]
        ]
        if runs:
            curves.append({"name": method["name"], "method": method["method"], "runs": runs})
    return curves


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, written in percent."""
    return not any(word in metric for word in _NOT_SHARES)


def format_score(value: float, metric: str) -> str:
    """A score as its metric is written: in percent, or as a number."""
    return format_share(value) if is_share(metric) else format_number(float(value))


def _ratio(found: Mapping[str, Any] | None) -> str:
    if not found:
        return _NONE
    return "refused" if "refused" in found else f"{found['ratio']:.2f}x"


def _or_none(value: Any, write: Any) -> str:
    return _NONE if value is None else write(value)


def _words(key: str) -> str:
    return key.replace("_", " ")
