"""The report of a sweep: its arms in a table, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.formatting import format_bytes, format_count, format_duration
from lorakit.report.methods import format_score
from lorakit.report.schema import MethodTable, Report

_NONE = "–"
_LOSS = "validation loss"
_MAX_CURVES = 20


def sweep_report(record: Mapping[str, Any]) -> Report:
    """The sections of sweep.json."""
    arms: list[Mapping[str, Any]] = record["arms"]
    best = next((arm for arm in arms if arm["name"] == record["best"]), None)
    report: Report = {
        "title": str(record["title"]),
        "subtitle": f"{len(arms)} adapters over one base, {record['together']} in a batch",
        "tiles": [
            {"label": "arms", "value": str(len(arms))},
            {"label": "time", "value": format_duration(record["seconds"]["this_call"])},
            {
                "label": "peak memory",
                "value": format_bytes(record["memory"]["peak_bytes"]),
                "note": "of the whole process; the plan counts "
                f"{format_bytes(record['memory']['estimate']['total_bytes'])} for the training",
            },
        ],
        "methods": sweep_table(record),
        "method_curves": [
            {"name": arm["name"], "method": arm["name"], "runs": [arm["eval_curve"]]}
            for arm in arms[:_MAX_CURVES]
            if arm["eval_curve"]
        ],
        "details": {"Versions": dict(record["versions"]), "Hardware": dict(record["hardware"])},
        "command": str(record["command"]),
    }
    if best is not None:
        tiles = report.get("tiles", [])
        value = _value_of(best, best["by"])
        tiles.insert(0, {"label": f"best {best['by']}", "value": value, "note": best["name"]})
    return report


def sweep_table(record: Mapping[str, Any]) -> MethodTable:
    """One row per arm, formatted for a terminal or a page."""
    judged = dict.fromkeys([_LOSS, *(arm["by"] for arm in record["arms"])])
    columns = ["arm", "settings", "trained", *judged, "at step", "stopped at", "time"]
    notes = ["Validation: of the adapter that was kept. Time: the arm's share of each batch."]
    notes += [f"{arm['name']} failed: {arm['failed']}." for arm in record["arms"] if arm["failed"]]
    hidden = len(record["arms"]) - _MAX_CURVES
    if hidden > 0:
        notes.append(f"The curves of the {hidden} last arms are not drawn.")
    rows = [
        _row(arm, list(judged), is_best=arm["name"] == record["best"]) for arm in record["arms"]
    ]
    return {
        "columns": columns,
        "rows": rows,
        "note": " ".join(notes),
        "heading": "Arms",
        "curves_note": "One line per arm.",
    }


def _row(arm: Mapping[str, Any], judged: Sequence[str], *, is_best: bool) -> list[str]:
    stopped = f"{arm['steps']} (end)"
    if arm["dropped_at"] is not None:
        stopped = f"{arm['dropped_at']} (halving)"
    elif arm["failed"]:
        stopped = f"{arm['steps']} (failed)"
    return [
        f"{arm['name']}{' (best)' if is_best else ''}",
        ", ".join(f"{key}={_value(value)}" for key, value in arm["settings"].items()) or _NONE,
        format_count(arm["trainable_params"]),
        *(_value_of(arm, by) for by in judged),
        _NONE if arm["best_step"] is None else str(arm["best_step"]),
        stopped,
        format_duration(arm["busy_s"]),
    ]


def _value_of(arm: Mapping[str, Any], by: str) -> str:
    """The validation loss of an arm, or the metric that decides how good it is."""
    value = arm["eval_loss"] if by == _LOSS else arm["value"]
    if value is None or by not in (_LOSS, arm["by"]):
        return _NONE
    return format_score(float(value), by)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
