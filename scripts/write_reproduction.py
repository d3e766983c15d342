"""Write docs/reproduction.md from the committed results of `lorakit paper`.

python scripts/write_reproduction.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.formatting import format_duration
from lorakit.paper.experiments import EXPERIMENTS, Experiment
from lorakit.paper.output import read_results
from lorakit.paper.page import SPREAD_NOTE, notes

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
        parts += [f"## {experiment.title}", *_section(experiment, results.get(name))]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _section(experiment: Experiment, result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return [f"On {experiment.model}: {experiment.about}.", _NOT_RUN]
    machine = result["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    place = gpus or f"{machine['cpu']}, {machine['num_threads']} threads"
    seconds = result["seconds"].get("all_cells", result["seconds"]["this_call"])
    file = f"benchmarks/results/paper/{experiment.name}.json"
    findings = [[f["claim"], f["paper"], f["ours"], f["verdict"]] for f in result["findings"]]
    return [
        " ".join(notes(result)),
        _table(result["table"]["columns"], result["table"]["rows"]),
        _table(["compared", "paper", "ours", ""], findings),
        f"Scale {result['scale']}, seeds {', '.join(map(str, result['seeds']))}, "
        f"{format_duration(seconds)} on {place}, {result['finished_at'][:10]}: "
        f"[{file}](../{file}).",
    ]


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
