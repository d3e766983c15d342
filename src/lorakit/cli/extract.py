"""`lorakit extract`: the difference of two models as an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorakit.adapters.spec import LoraSpec
from lorakit.cli import console
from lorakit.composing.extract import Extraction, by_size, extract_with_report
from lorakit.files import require_free
from lorakit.formats.peft import write_adapter
from lorakit.formatting import format_count, format_number, format_share

SUMMARY = "make an adapter of a fine-tuned model"

_NUM_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit extract`."""
    parser.add_argument("--base", required=True, metavar="REF", help="the model before")
    parser.add_argument("--tuned", required=True, metavar="REF", help="the model after training")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where to; must not exist yet, or be empty",
    )
    parser.add_argument("-r", type=int, default=16, metavar="N", help="the rank")
    parser.add_argument(
        "--targets",
        action="append",
        metavar="NAME",
        help="what is approximated, as in a config; may be repeated (default: all-linear)",
    )
    parser.add_argument(
        "--also-train",
        action="append",
        default=[],
        metavar="NAME",
        help="a module that the adapter holds whole; may be repeated",
    )
    parser.add_argument(
        "--bias",
        choices=["none", "lora_only", "all"],
        default="none",
        help="biases that the adapter holds whole: none, those of the targets, or all of the model",
    )


def run(args: argparse.Namespace) -> int:
    """Extract, write and print; returns the exit code."""
    require_free(args.output)
    spec = LoraSpec(
        r=args.r,
        alpha=args.r if args.r > 0 else 1,
        targets=tuple(args.targets or ("all-linear",)),
        also_train=tuple(args.also_train),
        bias=args.bias,
    )
    found = extract_with_report(args.base, args.tuned, spec)
    write_adapter(found.adapter, Path(args.output))
    if args.json:
        facts = found.adapter.passport["extraction"]
        params = found.adapter.num_params()
        console.print_json({"output": args.output, "num_params": params, **facts})
    else:
        _show(found, args.output)
    return 0


def _show(found: Extraction, output: str) -> None:
    columns = ["site", "rank", "norm", "left out"]
    table = console.table("largest errors", columns, numbers=columns[1:])
    for site in sorted(found.sites, key=lambda site: -site.error / site.norm)[:_NUM_SHOWN]:
        share = format_share(site.error / site.norm)
        table.add_row(site.name, str(site.r), format_number(site.norm), share)
    console.stdout().print(table)
    if found.rest:
        columns = ["parameter", "changed by", "kept"]
        table = console.table("changed, and not low-rank", columns, numbers=columns[1:2])
        for rest in sorted(found.rest, key=by_size)[:_NUM_SHOWN]:
            share = "from zero" if rest.relative is None else format_share(rest.relative)
            table.add_row(rest.name, share, "yes" if rest.kept else "no")
        console.stdout().print(table)
    facts = {
        "size": f"{format_count(found.adapter.num_params())} parameters "
        f"at {len(found.sites)} sites",
        "left out": f"{format_share(found.relative_error)} of the sites' change, in norm",
        "other changes": f"{len(found.rest)} parameters, "
        f"{sum(rest.kept for rest in found.rest)} kept whole",
        "not held": f"{format_share(found.relative_lost)} of all that changed, in norm",
    }
    console.print_facts("extracted", facts)
    console.print_text(f"{output}: adapter and passport")
