"""What a comparison leaves: compare.json, compare.csv, report.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.files import write_json, write_text
from lorakit.report.collect import collect
from lorakit.report.html import write_report


def write_results(directory: Path, document: Mapping[str, Any]) -> None:
    """Write the three files, each whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    write_json(directory / "compare.json", document)
    write_text(directory / "compare.csv", csv_text(document))
    write_report(collect(directory), directory / "report.html")


def csv_text(document: Mapping[str, Any]) -> str:
    """One line per method; bytes, parameters and ratios as plain numbers."""
    metrics = list(dict.fromkeys(name for m in document["methods"] for name in m["scores"]))
    stream = io.StringIO()
    rows = [_line(method, metrics) for method in document["methods"]]
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _line(method: Mapping[str, Any], metrics: list[str]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": method["name"],
        "method": method["method"],
        "trainable_params": method["trainable_params"],
        "trainable_share": method["trainable_share"],
    }
    for name in metrics:
        score = method["scores"].get(name) or {}
        low, high = score.get("interval") or (None, None)
        line |= {
            name: score.get("value"),
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_median": score.get("median"),
            f"{name}_n": score.get("n"),
        }
    latency = method["latency"] or {}
    return {
        **line,
        "lr": method["lr"]["chosen"],
        "lr_at_edge": method["lr"]["edge"],
        "eval_loss": (method["eval_loss"] or {}).get("value"),
        "peak_bytes": method["memory"]["peak_bytes"],
        "above_base_bytes": method["memory"]["above_base_bytes"],
        "tokens_per_s": method["speed"]["tokens_per_s"],
        "examples_per_s": method["speed"]["examples_per_s"],
        "checkpoint_bytes": method["checkpoint_bytes"],
        "latency_unmerged": (latency.get("unmerged") or {}).get("ratio"),
        "latency_merged": (latency.get("merged") or {}).get("ratio"),
        "seconds_per_run": method["seconds"]["per_run"],
    }
