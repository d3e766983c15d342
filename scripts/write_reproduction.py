"""Write docs/reproduction.md from benchmarks/results/*.json and the paper's numbers.

python scripts/write_reproduction.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lorakit.report.methods import methods_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
_RESULTS = ROOT / "benchmarks" / "results"
_GLUE = {"glue_mrpc": "MRPC", "glue_cola": "CoLA", "glue_stsb": "STS-B", "glue_sst2": "SST-2"}
_NOT_RUN = "Not run yet: there is no committed result."
_HEAD = """# Reproduction

The paper's claim is a comparison, so it is repeated here as one: our numbers beside the paper's.
Models and budgets are not the paper's. What can be compared is the order of the methods and the
cost of each, not the height of a score. Written by `scripts/write_reproduction.py` from the
committed results; do not edit it by hand.
"""


def page() -> str:
    """The text of docs/reproduction.md."""
    paper = json.loads((ROOT / "benchmarks" / "paper.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks" / "paper_notes.yaml").read_text(encoding="utf-8")
    notes: dict[str, str] = yaml.safe_load(text)
    parts = [_HEAD, "## GLUE", _glue_setting(), _paper_table(paper["glue"], "tasks", "Table 2")]
    for name, task in _GLUE.items():
        parts += [f"### {task}", *_ours(name, notes)]
    e2e = (
        "The paper: GPT-2 medium, 5 epochs of 42,061 rows, beam 10. Ours: SmolLM2, a slice, greedy."
    )
    parts += ["## E2E", e2e, _paper_table(paper["e2e"], "metrics", "Table 3")]
    parts += ["### Ours", *_ours("e2e", notes)]
    parts += ["## Latency", *_latency(paper["latency"], notes)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _glue_setting() -> str:
    return (
        "The paper: RoBERTa base (125M), up to 80 epochs, median of 5 seeds. Ours: MiniLM (22M), "
        "a few hundred steps, mean of the seeds with its t-interval, rates chosen on held-out "
        "training rows."
    )


def _ours(name: str, notes: dict[str, str]) -> list[str]:
    file = _RESULTS / f"compare_{name}.json"
    if not file.is_file():
        return [_NOT_RUN]
    document = json.loads(file.read_text(encoding="utf-8"))
    found = methods_table(document)
    hardware = document["hardware"]
    where = f"{hardware['cpu']}, {hardware['num_threads']} threads"
    command = f"`{Path(document['command']).name}` on {where}"
    return [
        _table(found["columns"], found["rows"]),
        found.get("note", ""),
        f"Command: {command}.",
        notes.get(name, ""),
    ]


def _paper_table(section: dict[str, Any], key: str, name: str) -> str:
    rows = [[row["method"], row["trainable"], *map(str, row["values"])] for row in section["rows"]]
    return f"{name} of the paper:\n\n" + _table(["method", "trained", *section[key]], rows)


def _latency(paper: dict[str, Any], notes: dict[str, str]) -> list[str]:
    rows = [
        [name, *(f"+{value} %" for value in values)]
        for name, values in paper["overhead_pct"].items()
    ]
    parts = [
        "Table 1 of the paper (GPT-2 medium): time of a forward pass beyond full fine-tuning or "
        "merged LoRA:\n\n" + _table(["method", *paper["columns"]], rows)
    ]
    if not (_RESULTS / "latency.json").is_file():
        return [*parts, _NOT_RUN]
    where = "[benchmarks/results/latency.json](../benchmarks/results/latency.json)"
    return [*parts, f"Ours: {where}.", notes.get("latency", "")]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
