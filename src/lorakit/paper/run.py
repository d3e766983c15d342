"""Run one experiment of the paper, from its data to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from lorakit.environment import command_line, hardware, versions
from lorakit.errors import RequestError
from lorakit.files import write_json
from lorakit.paper.comparisons import (
    Request,
    config_of,
    require_data,
    run_comparisons,
    seeds_of,
)
from lorakit.paper.directions import (
    amplification,
    amplification_findings,
    amplification_table,
    rank_findings,
    seed_findings,
    shared_directions,
    shared_table,
)
from lorakit.paper.findings import summary
from lorakit.paper.latency import LatencySettings, measure
from lorakit.paper.latency_table import SOURCE, latency_findings, latency_table
from lorakit.paper.output import claim, result_file
from lorakit.paper.scores import paper_numbers, score_findings, score_table, text_table
from lorakit.train.run import Say, say_on_stderr

_SOURCES = {
    "table7": "Table 7, W_q of layer 48 of GPT-3, ||W_q||_F = 61.95",
    "figure3": "Figure 3, layer 48 of GPT-3, r=8 and r=64",
    "figure4": "Figure 4, layer 48 of GPT-3, r=64, two seeds",
}
Measured = dict[str, Any]


def run_experiment(request: Request, *, say: Say = say_on_stderr) -> dict[str, Any]:
    """Run what is not finished of an experiment, compare it with the paper, and write the result.

    What is refused is refused before anything is run: data, scale, output, overrides. A run that
    was stopped goes on when the same is asked again.

    Args:
        request: which experiment, on what, at which scale.
        say: takes a line for each cell.

    Returns:
        What was written as NAME.json in the output: what was measured, tables and findings.

    Raises:
        RequestError: what is asked for cannot be.
        WorkError: a run failed.
        TrainingPaused: Ctrl-C; the same call goes on.
    """
    started = time.perf_counter()
    experiment = request.experiment
    _check(request)
    claim(request.output, request.scale)
    measured = _latency(request, say) if experiment.kind == "latency" else _trained(request, say)
    findings = [found.to_json() for found in measured.pop("findings")]
    result = {
        "kind": "paper",
        "experiment": experiment.name,
        "title": experiment.title,
        "model": experiment.model,
        "scale": request.scale,
        "slice": request.chosen.about,
        "overrides": list(request.overrides),
        "only": list(request.only),
        "summary": summary(findings),
        "findings": findings,
        **measured,
        "seconds": {"this_call": time.perf_counter() - started, **measured["seconds"]},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(result_file(request.output, experiment.name), result)
    return result


def _check(request: Request) -> None:
    if request.scale == "gpu" and not torch.cuda.is_available():
        raise RequestError(
            "there is no CUDA device for this scale",
            where="--scale gpu",
            remedy="use --scale laptop",
        )
    if request.only and request.experiment.kind != "compare":
        raise RequestError(
            f"{request.experiment.name} needs all its methods",
            where="--only",
            found=", ".join(request.only),
        )
    require_data(request)
    for part in request.experiment.parts:
        config_of(part, request)
    if request.experiment.kind == "latency":
        _settings(request)


def _settings(request: Request) -> LatencySettings:
    return LatencySettings.from_overrides([*request.chosen.overrides, *request.overrides])


def _latency(request: Request, say: Say) -> Measured:
    settings = _settings(request)
    found = measure(settings, request.output / "latency", say)
    return {
        "source": SOURCE,
        "seeds": [settings.seed],
        "table": latency_table(found),
        "findings": latency_findings(found),
        "latency": found,
        "seconds": {},
    }


def _trained(request: Request, say: Say) -> Measured:
    documents = run_comparisons(request, say)
    return {
        **_DO[request.experiment.kind](request, documents),
        "seeds": list(seeds_of(documents)),
        "comparisons": {name: _short(document) for name, document in documents.items()},
        "seconds": {"all_cells": sum(d["seconds"]["all_cells"] for d in documents.values())},
    }


def _scores(request: Request, documents: Mapping[str, Any]) -> Measured:
    name = request.experiment.name
    scores = score_table(name, documents)
    return {
        "source": paper_numbers()[name]["source"],
        "scores": scores,
        "table": text_table(scores),
        "findings": score_findings(name, documents),
    }


def _amplification(request: Request, documents: Mapping[str, Any]) -> Measured:
    found = amplification(request, documents)
    return {
        "source": _SOURCES["table7"],
        "amplification": found,
        "table": amplification_table(found),
        "findings": amplification_findings(found),
    }


def _shared(request: Request, documents: Mapping[str, Any]) -> Measured:
    found = shared_directions(request, documents)
    readings = rank_findings if request.experiment.kind == "ranks" else seed_findings
    return {
        "source": _SOURCES[request.experiment.name],
        "subspaces": found,
        "table": shared_table(found),
        "findings": readings(found),
    }


_DO: dict[str, Callable[[Request, Mapping[str, Any]], dict[str, Any]]] = {
    "compare": _scores,
    "amplification": _amplification,
    "ranks": _shared,
    "seeds": _shared,
}


def _short(document: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison without what stands in its own compare.json only: curves, notes, logs."""
    kept = ("title", "complete", "num_cells", "metric", "methods", "data", "config", "seconds")
    cells = [
        {key: cell[key] for key in ("arm", "kind", "lr", "seed", "scores", "eval_loss", "seconds")}
        for cell in document["cells"]
    ]
    return {**{key: document[key] for key in kept}, "cells": cells}
