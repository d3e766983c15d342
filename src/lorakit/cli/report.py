"""`lorakit report`: one self-contained HTML file from what a run left in its directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorakit.cli import console
from lorakit.formatting import format_bytes
from lorakit.report.collect import collect
from lorakit.report.html import write_report

SUMMARY = "write one HTML file from what a run left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit report`."""
    parser.add_argument("directory", help="the output directory of train, demo, eval or merge")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the HTML file (default: DIRECTORY/report.html)"
    )


def run(args: argparse.Namespace) -> int:
    """Collect, write, and say where the file is; returns the exit code."""
    report = collect(args.directory)
    path = write_report(report, args.output or Path(args.directory) / "report.html")
    num_bytes = path.stat().st_size
    if args.json:
        sections = [name for name, value in report.items() if value]
        console.print_json({"report": str(path), "bytes": num_bytes, "sections": sections})
    else:
        console.print_text(str(path))
        console.note(f"{format_bytes(num_bytes)}; open it in a browser")
    return 0
