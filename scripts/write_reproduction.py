"""Write docs/reproduction.md from the committed results of `lorakit paper`.

python scripts/write_reproduction.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.formatting import format_duration
from lorakit.paper.experiments import EXPERIMENTS, Experiment
from lorakit.paper.findings import summary
from lorakit.paper.output import read_results
from lorakit.paper.page import SPREAD_NOTE, notes
from lorakit.paper.scores import paper_numbers, score_findings, score_table, text_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "benchmarks" / "results" / "paper"
_HEAD = f"""# Reproduction

The paper's claim is a comparison, so it is repeated here as one: our numbers beside the paper's.
Models and budgets are not the paper's. What can be compared is the order of the methods and the
cost of each, not the height of a score. Written by `scripts/write_reproduction.py` from the
committed results of [lorakit paper](paper.md); do not edit it by hand.

{SPREAD_NOTE}
"""
_NOT_RUN = "Not run yet: there is no committed result."


def page() -> str:
    """The text of docs/reproduction.md."""
    results = read_results(RESULTS)
    parts = [_HEAD]
    for name, experiment in EXPERIMENTS.items():
        result = results.get(name)
        body = _comparisons(experiment) if result is None else _result(experiment, result)
        parts += [f"## {experiment.title}", *body]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _result(experiment: Experiment, result: Mapping[str, Any]) -> list[str]:
    seconds = result["seconds"].get("all_cells", result["seconds"]["this_call"])
    return [
        " ".join(notes(result)),
        _table(result["table"]["columns"], result["table"]["rows"]),
        _findings(result["findings"]),
        f"Scale {result['scale']}, seeds {', '.join(map(str, result['seeds']))}, "
        f"{_where(result, seconds)}: {_link(RESULTS / f'{experiment.name}.json')}.",
    ]


def _comparisons(experiment: Experiment) -> list[str]:
    """What benchmarks/compare_methods.py left, where `lorakit paper` was not run."""
    head = f"On {experiment.model}: {experiment.about}."
    files = {p.config: RESULTS.parent / f"compare_{p.config}.json" for p in experiment.parts}
    documents: dict[str, dict[str, Any]] = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.is_file()
    }
    if experiment.kind != "compare" or not documents:
        return [head, _NOT_RUN]
    table = text_table(score_table(experiment.name, documents))
    findings = [found.to_json() for found in score_findings(experiment.name, documents)]
    where = [
        f"{name}: {_where(found, found['seconds']['all_cells'])}, {_link(files[name])}"
        for name, found in documents.items()
    ]
    return [
        f"The paper: {paper_numbers()[experiment.name]['source']}. {head} {summary(findings)}",
        _table(table["columns"], table["rows"]),
        _findings(findings),
        f"{'; '.join(where)}.",
        # What whoever ran it knows and the numbers do not show.
        *dict.fromkeys(found["remark"] for found in documents.values() if "remark" in found),
    ]


def _where(record: Mapping[str, Any], seconds: float) -> str:
    machine = record["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    place = gpus or f"{machine['cpu']}, {machine['num_threads']} threads"
    return f"{format_duration(seconds)} on {place}, {record['finished_at'][:10]}"


def _link(file: Path) -> str:
    name = file.relative_to(ROOT).as_posix()
    return f"[{name}](../{name})"


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f["claim"], f["paper"], f["ours"], f["verdict"]] for f in findings]
    return _table(["compared", "paper", "ours", ""], rows)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escaped(line)) + " |" for line in lines)


def _escaped(cells: list[str]) -> list[str]:
    # A norm's bars would be read as the table's.
    return [cell.replace("|", "\\|") for cell in cells]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
