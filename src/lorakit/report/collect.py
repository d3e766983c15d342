"""Gather the records a run left in its directory into one report.

Read, where they exist: run.json (training), metrics.jsonl (losses), result.json (a demo),
eval.json (an evaluation), merge.json (a merge; here or one directory below), or, each of which
stands alone, compare.json (a comparison of methods) and sweep.json (a sweep). Every dict that maps
systems to metrics to estimates becomes the comparison; everything that is not shown elsewhere is
listed under the details.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import RequestError
from lorakit.report.details import details
from lorakit.report.methods import methods_report
from lorakit.report.ranks import rank_section
from lorakit.report.schema import Curve, Report
from lorakit.report.sections import certificate, comparison, samples, subtitle, tiles
from lorakit.report.sweeps import sweep_report

# In this order: where two records bring a section, the first one counts.
COMPARISON = "compare.json"
SWEEP = "sweep.json"
_RECORDS = ("result.json", "run.json", "eval.json")


def collect(directory: str | Path) -> Report:
    """The report of a run directory.

    Raises:
        RequestError: the directory does not exist, holds no record, or a record is damaged or
            another version's.
    """
    directory = Path(directory)
    try:
        return _collected(directory)
    except (KeyError, TypeError) as error:
        raise RequestError(
            "a record is not as this version of lorakit writes it",
            where=str(directory),
            found=f"no {error}" if isinstance(error, KeyError) else str(error),
            remedy="run again: what is finished is not repeated",
        ) from error


def _collected(directory: Path) -> Report:
    if not directory.is_dir():
        raise RequestError(
            "there is no such run directory",
            where=str(directory),
            expected="the output directory of lorakit train, demo, eval or merge",
        )
    if (directory / COMPARISON).is_file():
        return methods_report(_read(directory / COMPARISON))
    if (directory / SWEEP).is_file():
        return sweep_report(_read(directory / SWEEP))
    records = {name: _read(directory / name) for name in _RECORDS if (directory / name).is_file()}
    curve = read_curve(directory / "metrics.jsonl")
    merges = [file for file in _merge_files(directory) if file.is_file()]
    if not records and not curve["train"] and not merges:
        raise RequestError(
            "the directory holds no record of a run",
            where=str(directory),
            expected=f"{', '.join(_RECORDS)}, {COMPARISON}, {SWEEP}, metrics.jsonl or merge.json",
            remedy="give the output directory of a run",
        )
    report = _from_records(directory, records)
    if curve["train"]:
        report["curve"] = curve
    if merges:
        report["certificate"] = certificate(_read(merges[0]))
    return report


def read_curve(file: Path) -> Curve:
    """The losses of metrics.jsonl, or the rewards if it has some; empty when there is none.

    Raises:
        RequestError: a line before the last is damaged.
    """
    curve: Curve = {"train": [], "validation": []}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    validation: list[list[float]] = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                # A run that was killed, or is still going on, leaves a half line.
                break
            raise _damaged(f"{file} line {number}", error) from error
        name = "reward" if "reward" in line or "eval_reward" in line else "loss"
        if "eval_loss" in line:
            validation.append([line["step"], line[f"eval_{name}"]])
        elif "loss" in line:
            curve["train"].append([line["step"], line[name]])
        if name == "reward":
            curve["measure"] = name
    curve["validation"] = validation
    return curve


def _merge_files(directory: Path) -> Iterator[Path]:
    yield directory / "merge.json"
    yield from sorted(directory.glob("*/merge.json"))


def _from_records(directory: Path, records: Mapping[str, dict[str, Any]]) -> Report:
    # Kept apart: the same key ("adapter", "data") means different things in different records.
    found = [records[name] for name in _RECORDS if name in records]
    report: Report = {
        "title": next((str(r["title"]) for r in found if "title" in r), directory.resolve().name),
        "subtitle": next(filter(None, map(subtitle, found)), ""),
        "tiles": next(filter(None, map(tiles, found)), []),
        "samples": next(filter(None, map(samples, found)), []),
        "details": {},
        "command": next((str(r["command"]) for r in found if "command" in r), ""),
    }
    ranks = next(filter(None, map(rank_section, found)), None)
    if ranks is not None:
        report["sections"] = [ranks]
    table = next(filter(None, map(comparison, found)), None)
    if table is not None:
        report["comparison"] = table
    for name, record in records.items():
        for group, facts in details(record).items():
            label = "Evaluation" if (name, group) == ("eval.json", "Run") else group
            report["details"].setdefault(label, facts)
    return report


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(str(file), error) from error
    if not isinstance(record, dict):
        raise RequestError(
            "a record is not an object",
            where=str(file),
            expected="a JSON object",
            found=f"a {type(record).__name__}",
        )
    return record


def _damaged(where: str, error: Exception) -> RequestError:
    return RequestError(
        "a record is damaged",
        where=where,
        expected="JSON",
        found=str(error),
        remedy="remove the file, or run again",
    )
