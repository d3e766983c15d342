"""`lorakit export`: an adapter for another engine, and the command that serves it there."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lorakit.cli import console
from lorakit.handover.run import ENGINES, export_adapter

SUMMARY = "write an adapter for another engine, and print its command"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit export`."""
    parser.add_argument("adapter", help="an adapter's directory")
    parser.add_argument(
        "--for", dest="engine", required=True, choices=ENGINES, help="who is to load it"
    )
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
        help="the base as that engine finds it: a hub id or a directory; by default the one that "
        "the adapter names",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="the adapter's name in requests; by default the output's"
    )


def run(args: argparse.Namespace) -> int:
    """Export and print the command; returns the exit code."""
    exported = export_adapter(
        Path(args.adapter),
        Path(args.output),
        engine=args.engine,
        base=args.base,
        name=args.name,
    )
    if args.json:
        console.print_json(asdict(exported))
        return 0
    facts: dict[str, object] = {"checked": "; ".join(exported.checked)}
    if exported.changed:
        facts["written otherwise"] = "; ".join(exported.changed)
    facts["files"] = ", ".join(exported.files)
    console.print_facts(f"{exported.path} for {exported.engine}", facts)
    console.print_text(exported.command)
    return 0
