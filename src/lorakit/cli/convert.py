"""`lorakit convert`: an adapter in the format of another tool, and back."""

from __future__ import annotations

import argparse
from typing import Any

from lorakit.cli import console
from lorakit.cli.parser import add_list_below
from lorakit.converting import ConvertOptions, convert
from lorakit.formats.registry import EXPERT_LAYOUTS, FOREIGN, PEFT
from lorakit.formatting import format_count, format_number

SUMMARY = "convert an adapter from or to another tool's format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit convert`."""
    parser.add_argument("source", help="an adapter's directory or file, of any format")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where to; must not exist yet, or be empty",
    )
    parser.add_argument(
        "--to",
        default=PEFT,
        metavar="FORMAT",
        help="what to write; the formats are listed below",
    )
    abouts = {name: found.about for name, found in FOREIGN.items()}
    abouts |= dict.fromkeys(EXPERT_LAYOUTS, "PEFT's directory, expert weights stacked as it does")
    add_list_below(parser, "formats", {PEFT: "PEFT's directory, which lorakit writes", **abouts})
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="by default as the path looks"
    )
    parser.add_argument(
        "--base",
        "--model",
        dest="base",
        metavar="REF",
        help="the base, by default the one that the source names; only its configuration is read",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="of a loralib file, read or written, which does not hold it",
    )
    parser.add_argument(
        "--parts",
        metavar="A,B",
        help="of a loralib file: which parts of fused projections are adapted, as in q,v",
    )
    parser.add_argument(
        "--prefix",
        metavar="TEXT",
        help="before every name in kohya's format (default: lora_te; read: any lora_te, lora_te1, "
        "...); what begins otherwise is not read",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print; returns the exit code."""
    parts = tuple(name.strip() for name in (args.parts or "").split(",") if name.strip())
    record = convert(
        args.source,
        args.output,
        args.to,
        base=args.base,
        options=ConvertOptions(
            source_format=args.source_format, alpha=args.alpha, parts=parts, prefix=args.prefix
        ),
    )
    if args.json:
        console.print_json(record)
    else:
        _show(record)
    return 0


def _show(record: dict[str, Any]) -> None:
    facts = {"from": record["from"], "to": record["to"], "base": record["base"]}
    if "num_updates" in record:
        facts["updates"] = format_count(record["num_updates"])
        facts["read back"] = "every change, relative error at most " + format_number(
            record["max_relative_error"]
        )
        if record["to"] == "loralib":
            facts["lora_alpha"] = (
                f"{record['alpha']:g}, for the model's code: loralib's file does not hold it"
            )
    else:
        facts["updates"] = f"{record['moved']} moved, {record['as_they_were']} as they were"
        if record["stacked"]:
            facts["stacked from"] = f"{format_count(record['stacked'])} updates of single experts"
    console.print_facts("converted", facts)
    console.print_text(record["output"])
