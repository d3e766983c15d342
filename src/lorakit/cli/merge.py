"""`lorakit merge`: fold an adapter into its base on disk, with a certificate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorakit.cli import console
from lorakit.formatting import format_duration, format_number
from lorakit.merging.certificate import CERTIFICATE_NAME
from lorakit.merging.run import MergeRequest, merge_to_disk

SUMMARY = "fold an adapter into its base, with a certificate"

_NUM_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit merge`."""
    parser.add_argument("adapter", help="an adapter's directory")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where to; must not exist yet, or be empty",
    )
    parser.add_argument(
        "--base",
        "--model",
        dest="base",
        metavar="REF",
        help="the base: a hub id, a directory, a .gguf file or a named model; by default the one "
        "that the adapter names",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="merge even if it was trained on another base"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="compute the proof in this dtype; the weights keep the one they are stored in",
    )
    parser.add_argument(
        "--onto",
        choices=["dense", "nf4-dequantized"],
        default="dense",
        help="merge into the original weights, or into these as NF4 holds them, multiplied out: "
        "what an adapter trained on NF4 was trained beside (default: %(default)s)",
    )
    parser.add_argument(
        "--requantize",
        choices=["nf4"],
        help="store the merged model in 4 bits, with a report of what survived",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, prove and print; returns the exit code."""
    certificate = merge_to_disk(
        MergeRequest(
            adapter=Path(args.adapter),
            output=Path(args.output),
            base=args.base,
            any_base=args.any_base,
            dtype=args.dtype,
            onto=args.onto,
            requantize=args.requantize,
        )
    )
    if args.json:
        console.print_json(certificate)
        return 0
    print_certificate(certificate)
    lost = [t for t in certificate["tensors"] if t["survival"] < 0.9]
    if lost:
        table = console.table(
            "little of these changes survives the rounding", ["tensor", "survival"]
        )
        for tensor in sorted(lost, key=lambda t: t["survival"])[:_NUM_SHOWN]:
            table.add_row(tensor["name"], f"{tensor['survival']:.1%}")
        console.stdout().print(table)
    if "requantized" in certificate:
        _show_survival(certificate["requantized"])
    console.print_text(f"{args.output}: merged model and {CERTIFICATE_NAME}")
    return 0


def _show_survival(report: dict[str, Any]) -> None:
    """What is left of the adapter after the merged weights were quantized again."""
    columns = ["layer", "share left", "relative error"]
    table = console.table("survival in 4 bits, worst layers", columns, numbers=columns[1:])
    for layer in sorted(report["layers"], key=lambda x: -x["relative_error"])[:_NUM_SHOWN]:
        table.add_row(layer["name"], f"{layer['share']:.1%}", f"{layer['relative_error']:.2f}")
    console.stdout().print(table)
    facts = {
        "mean logit error": f"{format_number(report['mean_abs_logit_error'])} where the adapter "
        f"changes logits by {format_number(report['mean_abs_logit_change'])} on average",
        "recommendation": report["recommendation"],
    }
    if report["share"] is not None:
        facts = {
            "share of the change left": f"{report['share']:.1%}, relative error "
            f"{report['relative_error']:.2f}",
            **facts,
        }
    console.print_facts("requantized to NF4", facts)


def print_certificate(certificate: dict[str, Any]) -> None:
    """The merge certificate as a few lines."""
    console.print_facts("merge certificate", certificate_facts(certificate))


def certificate_facts(certificate: dict[str, Any]) -> dict[str, str]:
    """What a merge proved, label by label."""
    error = format_number(certificate["max_abs_logit_error"])
    facts = {
        "live against re-read": f"logits differ by at most {error} "
        f"(allowed {format_number(certificate['tolerance'])}, "
        f"largest logit {format_number(certificate['max_abs_logit'])})",
        "live against in memory": "at most "
        + format_number(certificate["max_abs_logit_error_in_memory"]),
        "what the adapter changes": "logits by up to "
        + format_number(certificate["max_abs_logit_change"]),
        "stored as": certificate["stored_dtype"],
    }
    if certificate["num_continuations"]:
        facts["greedy continuations"] = (
            f"{certificate['continuations_equal']} of {certificate['num_continuations']} equal"
        )
    if certificate["untied"]:
        facts["untied"] = "the output head and the embedding now have a weight each"
    if certificate["layers"]:
        worst = max(certificate["layers"], key=lambda layer: layer["max_abs_error"])
        facts["worst layer"] = (
            f"{worst['layer']}: {format_number(worst['max_abs_error'])} "
            f"of {format_number(worst['max_abs'])}"
        )
    facts["took"] = format_duration(certificate["seconds"])
    return facts
