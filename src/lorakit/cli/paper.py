"""`lorakit paper`: the paper's tables and figures on this machine, its numbers beside ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorakit.cli import console
from lorakit.errors import RequestError
from lorakit.formatting import format_bytes, format_duration
from lorakit.paper.comparisons import Request
from lorakit.paper.experiments import EXPERIMENTS, SCALES, find, require_scale
from lorakit.paper.page import PAGE_NAME, SPREAD_NOTE, listing, notes, write_page
from lorakit.paper.run import run_experiment

SUMMARY = "run the LoRA paper's experiments, its numbers beside ours"

_DEFAULT_OUTPUT = "runs/paper"
_PLAIN_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit paper`."""
    parser.add_argument("action", choices=["list", "run", "report"], help="what to do")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME | DIR | key=value",
        help="run: an experiment (or all), and values to put into its comparison; report: the "
        "directory of the results",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="run: this method only; may be repeated",
    )
    parser.add_argument("--data", metavar="DIR", help="the data sets; see docs/paper.md")
    parser.add_argument(
        "--scale",
        default=SCALES[0],
        metavar="SCALE",
        help=f"{' or '.join(SCALES)} (default: {SCALES[0]})",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help=f"list, run: the directory of all results (default: {_DEFAULT_OUTPUT}); report: the "
        f"HTML file (default: DIR/{PAGE_NAME})",
    )


def run(args: argparse.Namespace) -> int:
    """List, run or report; returns the exit code."""
    if args.action == "list":
        _refuse_words(args.words)
        _list(Path(args.output or _DEFAULT_OUTPUT), args.json)
    elif args.action == "run":
        _run(args)
    else:
        _report(args)
    return 0


def _list(output: Path, as_json: bool) -> None:
    found = listing(output)
    if as_json:
        console.print_json(found)
        return
    columns = ["name", "what", "model", "laptop", "gpu", "result"]
    table = console.table(None, columns, numbers=["laptop", "gpu"])
    for entry in found:
        done = entry["finished"]
        table.add_row(
            entry["name"],
            f"{entry['title'].partition(': ')[2]}: {entry['about']}",
            entry["model"],
            *(format_duration(entry["estimate_s"][scale]) for scale in SCALES),
            "" if done is None else f"{done['scale']}, {done['finished_at'][:10]}",
        )
    _print(table)
    needed = sorted({name for entry in found for name in entry["needs"]})
    console.note(f"data below --data DIR: {', '.join(needed)}")
    console.note(
        "times: laptop counted from speeds measured on two cores, gpu from assumed ones; table7, "
        "figure3 and figure4 share their runs"
    )


def _run(args: argparse.Namespace) -> None:
    names = [word for word in args.words if "=" not in word]
    if len(names) != 1:
        raise RequestError(
            "one experiment is run at a time",
            where="the command line",
            expected=f"{', '.join(EXPERIMENTS)}, or all",
            found=", ".join(names) or "nothing",
        )
    overrides = tuple(word for word in args.words if "=" in word)
    scale = require_scale(args.scale)
    chosen = list(EXPERIMENTS.values()) if names[0] == "all" else [find(names[0])]
    if (overrides or args.only) and len(chosen) > 1:
        raise RequestError(
            "methods and values cannot be chosen for all experiments at once",
            where="the command line",
            found=", ".join([*args.only, *overrides]),
            remedy="name one experiment",
        )
    output = Path(args.output or _DEFAULT_OUTPUT)
    results: list[dict[str, Any]] = []
    for experiment in chosen:
        request = Request(
            experiment=experiment,
            scale=scale,
            data=None if args.data is None else Path(args.data),
            output=output,
            overrides=overrides,
            only=tuple(args.only),
        )
        results.append(run_experiment(request, say=console.note))
        page = write_page(output)
        if not args.json:
            _show(results[-1])
            console.note(f"written: {output}/{experiment.name}.json, {page}")
    if args.json:
        console.print_json(results if names[0] == "all" else results[0])


def _report(args: argparse.Namespace) -> None:
    if len(args.words) != 1:
        raise RequestError(
            "one directory is needed",
            where="the command line",
            expected="lorakit paper report DIR",
            found=", ".join(args.words) or "nothing",
        )
    path = write_page(args.words[0], args.output)
    if args.json:
        console.print_json({"report": str(path), "bytes": path.stat().st_size})
        return
    console.print_text(str(path))
    console.note(f"{format_bytes(path.stat().st_size)}; open it in a browser")


def _show(result: dict[str, Any]) -> None:
    columns = result["table"]["columns"]
    table = console.table(result["title"], columns, numbers=columns[1:])
    for row in result["table"]["rows"]:
        table.add_row(*row)
    _print(table)
    for found in result["findings"]:
        console.print_text(f"{found['verdict']:<12} {found['claim']}: {found['ours']}")
    for note in notes(result):
        console.note(note)
    if "scores" in result:
        console.note(SPREAD_NOTE)


def _print(table: Any) -> None:
    out = console.stdout()
    if not out.is_terminal:
        out.width = _PLAIN_WIDTH
    out.print(table)


def _refuse_words(words: list[str]) -> None:
    if words:
        raise RequestError(
            "list takes no names",
            where="the command line",
            found=", ".join(words),
            remedy="lorakit paper run NAME runs one",
        )
