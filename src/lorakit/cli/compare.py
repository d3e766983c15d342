"""`lorakit compare`: several methods on one task, each with its own learning rate, one budget."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from lorakit.cli import console
from lorakit.cli.fields import one_file, show_fields
from lorakit.compare.config import CompareConfig
from lorakit.compare.estimate import Forecast
from lorakit.compare.run import Choice, CompareResult, compare, plan_compare
from lorakit.formatting import format_duration
from lorakit.report.methods import methods_table
from lorakit.train.schema import leaves

# Of the table in a file: it has more columns than a page.
_PLAIN_WIDTH = 160

SUMMARY = "compare methods on one task under one budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit compare`."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a comparison, and values to put in its place (data=DIR, budget.steps=100, "
        "base.train.batch_size=8)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="run this method only; may be repeated",
    )
    parser.add_argument(
        "--max-cells", type=int, metavar="N", help="run at most N cells, then show what there is"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the cells and how long they may take, and leave",
    )
    parser.add_argument(
        "--fields", action="store_true", help="list every key of the config, and leave"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, and print the table; returns the exit code."""
    if args.fields:
        show_fields("keys of a comparison", list(leaves(CompareConfig)), as_json=args.json)
        return 0
    config = read_config(args.config)
    choice = Choice(only=tuple(args.only), max_cells=args.max_cells)
    if args.dry_run:
        _show_plan(plan_compare(config, choice=choice), args.json)
        return 0
    result = compare(config, choice=choice, say=console.note)
    if args.json:
        console.print_json(
            {
                "directory": str(result.directory),
                "remaining": list(result.remaining),
                **result.document,
            }
        )
    else:
        _show(result)
    return 0


def read_config(words: list[str]) -> CompareConfig:
    """The config from "CONFIG.yaml key=value ...".

    Raises:
        RequestError: not exactly one file.
        ConfigError: the config is wrong.
    """
    file, overrides = one_file(words, verb="compare")
    return CompareConfig.from_yaml(file, overrides)


def _show(result: CompareResult) -> None:
    document: dict[str, Any] = result.document
    found = methods_table(document)
    # What a terminal has room for; compare.csv and the report have the rest.
    metrics = list(dict.fromkeys(name for m in document["methods"] for name in m["scores"]))
    left_out = {"share", "examples/s", *(name.replace("_", " ") for name in metrics[1:])}
    shown = [i for i, name in enumerate(found["columns"]) if name not in left_out]
    columns = [found["columns"][i] for i in shown]
    table = console.table(document["title"], columns, numbers=columns[1:])
    for row in found["rows"]:
        table.add_row(*(row[i] for i in shown))
    out = console.stdout()
    if not out.is_terminal:
        out.width = _PLAIN_WIDTH
    out.print(table)
    console.note(found.get("note", ""))
    if result.remaining:
        console.note(f"{len(result.remaining)} cells to go: run the same command again")
    console.note(f"written: {result.directory}/compare.json, compare.csv, report.html")


def _show_plan(forecast: Forecast, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "cells": [asdict(cell) for cell in forecast.cells],
                "num_finished": forecast.num_finished,
                "remaining_s": forecast.remaining_s,
            }
        )
        return
    table = console.table(None, ["cell", "steps", "took", "may take"], numbers=["steps"])
    for cell in forecast.cells:
        table.add_row(
            cell.name,
            "" if cell.steps is None else str(cell.steps),
            "" if cell.seconds is None else format_duration(cell.seconds),
            "" if cell.estimate_s is None else format_duration(cell.estimate_s),
        )
    console.stdout().print(table)
    remaining = forecast.remaining_s
    estimate = "not known before a cell of each kind is finished"
    console.note(
        f"{forecast.num_finished} of {len(forecast.cells)} cells finished; the others may take: "
        + (estimate if remaining is None else format_duration(remaining))
    )
