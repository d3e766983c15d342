"""The sections of a report, each from the plain values of run records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from lorakit.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_share,
    format_system,
)
from lorakit.report.details import with_unit, words
from lorakit.report.schema import Certificate, Comparison, ComparisonRow, Sample, Tile

# Metrics that are not fractions of something, whatever their value.
_NOT_SHARES = ("perplexity", "loss", "tokens", "seconds", "nats", "nist", "cider")
_MAX_SAMPLES = 8


def comparison(record: Mapping[str, Any]) -> Comparison | None:
    """The systems of a record side by side: its dicts of metrics, each an estimate.

    Returns:
        None when the record holds no estimates.
    """
    systems = dict(_systems(record))
    if not systems:
        return None
    metrics = list(dict.fromkeys(name for metrics in systems.values() for name in metrics))
    rows: list[ComparisonRow] = []
    for metric in metrics:
        cells = [metrics.get(metric) for metrics in systems.values()]
        numbers = {cell["n"] for cell in cells if cell is not None and "n" in cell}
        row: ComparisonRow = {
            "label": words(metric),
            "cells": cells,
            "share": _is_share(metric, cells),
        }
        if len(numbers) == 1:
            row["note"] = f"n = {format_count(numbers.pop())}"
        rows.append(row)
    return {"columns": [format_system(name) for name in systems], "rows": rows}


def certificate(record: Mapping[str, Any]) -> Certificate:
    """The certificate section of a merge record: its plain values, and its errors per layer."""
    error, tolerance = record.get("max_abs_logit_error"), record.get("tolerance")
    passed = bool(record.get("passed", True))
    if error is not None and tolerance is not None:
        passed = passed and error <= tolerance
    agree = "The live, the merged and the re-read model agree within the dtype's tolerance."
    facts = {
        words(key): with_unit(key, value)
        for key, value in record.items()
        if key not in ("passed", "statement") and not isinstance(value, Mapping | list)
    }
    return {
        "passed": passed,
        "statement": str(record.get("statement", agree if passed else "They do not agree.")),
        "facts": facts,
        "layers": [
            (f"layer {layer['layer']}", float(layer["max_abs_error"]))
            for layer in record.get("layers", [])
        ],
    }


def is_estimate(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value is an estimate as it stands in records."""
    return isinstance(value, dict) and "value" in value and "interval" in value


def _systems(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    # An evaluation keeps its systems together, each with "scores"; a demo has them at the top.
    for name, value in record.get("systems", record).items():
        if not isinstance(value, Mapping) or is_estimate(value):
            continue
        scores = value.get("scores", value)
        metrics = {metric: inner for metric, inner in scores.items() if is_estimate(inner)}
        if metrics:
            yield name, metrics


def _is_share(metric: str, cells: list[dict[str, Any] | None]) -> bool:
    if any(word in metric.lower() for word in _NOT_SHARES):
        return False
    return all(cell is None or 0 <= cell["value"] <= 1 for cell in cells)


def subtitle(record: Mapping[str, Any]) -> str:
    """The line below the title: the record's own, else what was trained on what; "" of neither."""
    if "subtitle" in record:
        return str(record["subtitle"])
    config, data = record.get("config"), record.get("data")
    rows = data.get("train") if isinstance(data, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(rows, Mapping) or "model" not in config:
        return ""
    method = str(config.get("method", "lora"))
    learned = f"{format_count(rows['num_rows'])} rows of {rows['source']}"
    return f"method {method} on {config['model']['ref']}, task {config['task']}, {learned}"


def tiles(record: Mapping[str, Any]) -> list[Tile]:
    """The numbers at the top of a report: what the record has of sizes, losses and times."""
    if "tiles" in record:
        return record["tiles"]
    found: list[Tile] = []
    trained = _number(record, "trainable_params", "adapter.trainable_params")
    total = _number(record, "total_params", "base.num_params")
    if trained is not None:
        tile: Tile = {"label": "trained parameters", "value": format_count(trained)}
        share = _number(record, "adapter.trainable_share")
        if share is not None:
            tile["note"] = f"{format_share(float(share))} of all"
        elif total:
            tile["note"] = (
                f"{format_share(trained / (total + trained))} of {format_count(total + trained)}"
            )
        found.append(tile)
    adapter_bytes = _number(record, "adapter_bytes", "adapter.bytes")
    if adapter_bytes is not None:
        tile = {"label": "adapter", "value": format_bytes(adapter_bytes)}
        base_bytes = _number(record, "model_bytes", "base.bytes")
        if base_bytes is not None:
            tile["note"] = f"base {format_bytes(base_bytes)}"
        found.append(tile)
    loss = _number(record, "metrics.final.eval_loss")
    reward = _number(record, "metrics.final.eval_reward")
    shown, name = (loss, "loss") if reward is None else (reward, "reward")
    if shown is not None:
        found.append({"label": f"validation {name}", "value": format_number(float(shown))})
    seconds = _number(record, "seconds", "timing.total_s")
    if seconds is not None:
        tile = {"label": "time", "value": format_duration(seconds)}
        peak_bytes = _number(record, "peak_memory_bytes", "memory.peak_bytes")
        if peak_bytes is not None:
            tile["note"] = f"peak memory {format_bytes(peak_bytes)}"
        found.append(tile)
    return found


def samples(record: Mapping[str, Any]) -> list[Sample]:
    """The samples a record brings itself, else the first answers of an evaluation."""
    if "samples" in record:
        return record["samples"]
    outputs = record.get("outputs")
    if not isinstance(outputs, list):
        return []
    return [
        {
            "question": output.get("question") or output["prompt"],
            "reference": "\n".join(output["references"]),
            "answers": {
                name: {"text": answer["text"], "ok": _verdict(answer["scores"])}
                for name, answer in output["answers"].items()
            },
        }
        for output in outputs[:_MAX_SAMPLES]
    ]


def _verdict(scores: Mapping[str, float]) -> bool | None:
    """Right or wrong where a metric decides that; None where scores are a matter of degree."""
    for name in ("sql_execution", "exact_match"):
        if name in scores:
            return scores[name] == 1
    return None


def _number(record: Mapping[str, Any], *names: str) -> float | None:
    """The first number found under one of the dotted names."""
    for name in names:
        value: Any = record
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None
