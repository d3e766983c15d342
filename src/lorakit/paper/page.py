"""All finished experiments as one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.analysis.pairs import Similarity
from lorakit.analysis.plots import heat_maps
from lorakit.errors import RequestError
from lorakit.formatting import format_duration
from lorakit.paper.estimate import estimate_seconds
from lorakit.paper.experiments import EXPERIMENTS
from lorakit.paper.findings import counts
from lorakit.paper.output import MARK, read_results
from lorakit.report.html import write_report
from lorakit.report.method_figures import score_against_parameters
from lorakit.report.schema import MethodPoint, Report, Section

PAGE_NAME = "report.html"
SPREAD_NOTE = (
    "±: half the 95 % interval over the test rows and half the range over the seeds, as the root "
    "of the sum of squares. A difference within both spreads is level."
)
Result = Mapping[str, Any]


def write_page(directory: str | Path, file: str | Path | None = None) -> Path:
    """Write the page of a directory's results.

    Args:
        directory: the output of lorakit paper.
        file: the HTML file; by default report.html in it.

    Raises:
        RequestError: there is no such directory, or no result in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError("there is no such directory", where=str(directory))
    results = read_results(directory)
    if not results:
        raise RequestError(
            "the directory holds no result of lorakit paper",
            where=str(directory),
            expected=", ".join(f"{name}.json" for name in EXPERIMENTS),
            found=f"{MARK} alone" if (directory / MARK).is_file() else "none of them",
            remedy="run one: lorakit paper run NAME -o DIR",
        )
    return write_report(page(results), file or directory / PAGE_NAME)


def page(results: Mapping[str, Result]) -> Report:
    """The report of finished experiments."""
    findings = [found for result in results.values() for found in result["findings"]]
    number = counts(findings)
    scales = sorted({result["scale"] for result in results.values()})
    return {
        "title": "The paper's experiments",
        "subtitle": "Hu et al. 2021, LoRA (arXiv 2106.09685 v2), on other models and smaller "
        f"budgets: what can be compared is order, not height. Scale: {', '.join(scales)}.",
        "tiles": [
            {"label": "experiments", "value": f"{len(results)} of {len(EXPERIMENTS)}"},
            {
                "label": "comparisons that agree",
                "value": f"{number['agrees']} of {len(findings)}",
                "note": f"{number['disagrees']} disagree, {number['cannot tell']} cannot be told",
            },
        ],
        "sections": [s for result in results.values() for s in _sections(result)],
        "details": {result["title"]: _details(result) for result in results.values()},
        "command": "",
    }


def listing(output: str | Path) -> list[dict[str, Any]]:
    """Every experiment: what it is, what it needs, how long it may take, whether it is finished."""
    results = read_results(output)
    return [
        {
            "name": experiment.name,
            "title": experiment.title,
            "about": experiment.about,
            "model": experiment.model,
            "needs": list(experiment.needs),
            "slices": {name: scale.about for name, scale in experiment.scales.items()},
            "estimate_s": {
                scale: estimate_seconds(experiment, scale) for scale in experiment.scales
            },
            "finished": None
            if experiment.name not in results
            else {
                "scale": results[experiment.name]["scale"],
                "finished_at": results[experiment.name]["finished_at"],
                "summary": results[experiment.name]["summary"],
            },
        }
        for experiment in EXPERIMENTS.values()
    ]


def notes(result: Result) -> list[str]:
    """What a reader must know of a result before its numbers."""
    found = [
        f"The paper: {result['source']}.",
        f"Ours: {result['model']}; {result['slice']}.",
    ]
    if result["overrides"] or result["only"]:
        found.append(f"Changed by hand: {', '.join([*result['only'], *result['overrides']])}.")
    found += [
        f"Not complete: {document['num_cells']['finished']} of {document['num_cells']['planned']} "
        f"runs of {name}."
        for name, document in result.get("comparisons", {}).items()
        if not document["complete"]
    ]
    return [*found, result["summary"]]


def _sections(result: Result) -> list[Section]:
    spread = f" {SPREAD_NOTE}" if "scores" in result else ""
    table: Section = {
        "title": result["title"],
        "columns": result["table"]["columns"],
        "rows": result["table"]["rows"],
        "note": " ".join(notes(result)) + spread,
    }
    drawing = _drawing(result)
    if drawing is not None:
        table["svg"] = drawing
    findings: Section = {
        "title": f"{result['title']}: what agrees",
        "columns": ["compared", "paper", "ours", ""],
        "rows": [[f["claim"], f["paper"], f["ours"], f["verdict"]] for f in result["findings"]],
    }
    return [table, findings]


def _drawing(result: Result) -> str | None:
    if "subspaces" in result:
        shared = result["subspaces"]
        maps = [
            Similarity(
                site=found["site"],
                of=found["of"],
                phi=torch.tensor(found["phi"]),
                control=torch.tensor(found["control"]),
                first=found["first"],
                whole=found["whole"],
                chance=found["chance"],
            )
            for found in shared["maps"]
        ]
        return heat_maps(maps, (shared["labels"][0], shared["labels"][1]))
    if result["experiment"] != "figure2":
        return None
    (document,) = result["comparisons"].values()
    metric = document["metric"]
    points: list[MethodPoint] = [
        {
            "name": method["name"],
            "method": method["method"],
            "trainable_params": method["trainable_params"],
            "score": {"value": method["scores"][metric["name"]]["value"]},
        }
        for method in document["methods"]
        if metric and metric["name"] in method["scores"]
    ]
    return (
        score_against_parameters({"metric": metric["name"], "points": points}) if points else None
    )


def _details(result: Result) -> dict[str, Any]:
    machine = result["hardware"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    seconds = {key: format_duration(value) for key, value in result["seconds"].items()}
    kept = ("lorakit", "torch", "transformers", "python")
    return {
        "scale": result["scale"],
        "slice": result["slice"],
        "seeds": result["seeds"],
        "time": seconds,
        "hardware": gpus or f"{machine['cpu']}, {machine['num_threads']} threads",
        "versions": {key: result["versions"][key] for key in kept},
        "finished": result["finished_at"],
        "command": result["command"],
    }
