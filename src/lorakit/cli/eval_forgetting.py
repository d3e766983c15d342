"""`lorakit eval --beside --held-out`: what was learned, and what was forgotten for it."""

from __future__ import annotations

import argparse
from typing import Any

from lorakit.analysis.forgetting import Forgetting, ForgettingRequest, measure_forgetting
from lorakit.cli import console
from lorakit.cli.session import base_of, require_writer
from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import RequestError
from lorakit.evaluate.options import EvalOptions
from lorakit.files import write_json
from lorakit.formatting import format_count, format_estimate

_ADAPTER = "adapter"
_SHARES = ("exact match", "token f1", "sql execution", "choice", "bleu", "rouge l")


def add_forgetting_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --beside, --held-out and --held-out-length."""
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="something else that was trained on the same base, as in full=runs/full/adapter; "
        "may be repeated",
    )
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="NAME=ROWS",
        help="rows that have nothing to do with the task, whose perplexity says what was "
        "forgotten; may be repeated",
    )
    parser.add_argument(
        "--held-out-length",
        type=int,
        default=512,
        metavar="N",
        help="the longest held-out row, in tokens",
    )


def run_forgetting(args: argparse.Namespace, rows: Rows, options: EvalOptions) -> int:
    """Measure, and print what each system gained and lost; returns the exit code."""
    beside = _named("--beside", args.beside)
    held_out = _named("--held-out", args.held_out)
    systems = {_ADAPTER: args.adapter} if args.adapter else {}
    if _ADAPTER in beside and systems:
        raise RequestError(
            f"the name {_ADAPTER!r} is that of --adapter",
            where="the command line, --beside",
            remedy="give it another name",
        )
    systems |= beside
    if args.held_out_length < 2:
        raise RequestError(
            "held-out rows need at least two tokens",
            where="the command line, --held-out-length",
            expected=">= 2",
            found=str(args.held_out_length),
        )
    for path in systems.values():
        require_writer(path)
    request = ForgettingRequest(
        base=args.model or base_of(next(iter(systems.values()), None)),
        systems=systems,
        task=rows,
        options=options,
        held_out={name: load_rows(path) for name, path in held_out.items()},
        max_length=args.held_out_length,
        any_base=args.any_base,
        dtype=args.dtype,
        device=args.device,
    )
    result = measure_forgetting(request)
    record: dict[str, Any] = {
        "model": request.base,
        "adapters": dict(systems),
        "data": rows.to_json(),
        "held_out": {name: found.to_json() for name, found in request.held_out.items()},
        **result.to_json(),
    }
    if args.output:
        write_json(args.output, record)
    if args.json:
        console.print_json(record)
    else:
        _show(result, rows.source)
    return 0


def _named(flag: str, given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in found:
            raise RequestError(
                f"{flag} needs a name of its own and a path",
                where="the command line",
                expected="NAME=PATH, each name once",
                found=text,
            )
        found[name] = path
    return found


def _show(result: Forgetting, source: str) -> None:
    columns = ["", *result.scores]
    table = console.table(f"{source}: learned and forgotten", columns, numbers=columns[1:])
    for name, higher in result.higher_is_better.items():
        share = name.endswith(_SHARES)
        cells = [name + ("" if higher else " (lower is better)")]
        for label, scores in result.scores.items():
            text = format_estimate(scores[name].to_json(), share=share)
            if label in result.differences:
                change = result.differences[label][name]
                p = "p < 0.001" if change.p_value < 0.001 else f"p {change.p_value:.3f}"
                sign = "+" if change.estimate.value > 0 else ""
                gained = format_estimate(change.estimate.to_json(), share=share)
                text += f"\n{sign}{gained}, {p}"
            cells.append(text)
        table.add_row(*cells)
    console.stdout().print(table)
    rows = ", ".join(f"{name} {format_count(n)}" for name, n in result.num_rows.items())
    console.note(f"rows: {rows}; in brackets 95 % intervals; second lines: minus the base")
