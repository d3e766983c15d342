"""`lorakit demo`: teach a small real model a task, prove it, merge it, in minutes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from lorakit.cli import console
from lorakit.cli.merge import certificate_facts
from lorakit.demo.run import RESULT_NAME, DemoRequest, run_demo
from lorakit.demo.tasks import TASKS, build_task
from lorakit.errors import RequestError
from lorakit.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_estimate,
    format_number,
    format_share,
    format_system,
)
from lorakit.train.share import trained_share

SUMMARY = "teach a small real model a task and prove it, in minutes"

_MAX_ROWS = 3
# A little less than ten, as machines do not keep their speed.
_MINUTES = 9.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit demo`."""
    parser.add_argument(
        "--task",
        default="sql",
        metavar="NAME",
        help=f"what to learn: {', '.join(TASKS)} (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="where to; an earlier demo there is replaced (default: runs/demo, runs/demo-reviews)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        metavar="N",
        help="time of the whole demo: as much is learned as fits into it (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data and training")


def run(args: argparse.Namespace) -> int:
    """Run the demo, and print what it showed; returns the exit code."""
    task = build_task(args.task, args.seed)
    default = "runs/demo" if args.task == "sql" else f"runs/demo-{args.task}"
    output = Path(args.output or default)
    if not 0 < args.minutes < math.inf:
        raise RequestError(
            "the demo needs some time",
            where="--minutes",
            expected="a number above 0",
            found=f"{args.minutes:g}",
        )
    request = DemoRequest(task=task, output=output, seed=args.seed, seconds=60 * args.minutes)
    result = run_demo(request, say=console.note)
    if args.json:
        console.print_json(result)
    else:
        show(result, output)
    return 0


def show(result: dict[str, Any], output: Path) -> None:
    """Print what a demo showed: scores, samples, cost, certificate, files."""
    console.stdout().print()
    console.stdout().print(f"[bold]{result['title']}[/]", highlight=False)
    _show_scores(result)
    _show_samples(result["samples"])
    console.print_facts("cost", _cost(result))
    console.print_facts("merge certificate", certificate_facts(result["merge"]))
    console.print_facts(
        "left behind",
        {
            "adapter": f"{output / 'adapter'}  (PEFT loads it)",
            "merged model": f"{output / 'merged'}  (transformers loads it)",
            "numbers": str(output / RESULT_NAME),
            "report": f"{output / 'report.html'}  (open it in a browser)",
        },
    )


def _show_scores(result: dict[str, Any]) -> None:
    systems = [name for name in result if name.startswith("base") or name == "adapter"]
    metrics = list(result["base"])
    labels = [name.replace("_", " ") for name in metrics]
    asked = format_count(result["base"][metrics[0]]["n"])
    table = console.table(f"{asked} held-out questions", ["system", *labels], numbers=labels)
    for system in systems:
        cells = [format_estimate(result[system][metric]) for metric in metrics]
        table.add_row(format_system(system), *cells)
    console.stdout().print(table)
    console.note("in brackets: 95 % intervals")


def _show_samples(samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        *schema, question = sample["question"].split("\n")
        table = console.table(question, ["", "answer", "returns"])
        table.caption, table.caption_justify = "\n".join(schema) or None, "left"
        table.add_row("reference", sample["reference"], _rows(sample["reference_rows"]))
        for system, answer in sample["answers"].items():
            verdict = "[green]right[/]" if answer["ok"] else "[red]wrong[/]"
            returns = answer["error"] or _rows(answer["rows"])
            table.add_row(f"{system} ({verdict})", answer["text"], returns)
        console.stdout().print(table)


def _rows(rows: list[list[Any]] | None) -> str:
    if rows is None:
        return ""
    lines = [", ".join(str(value) for value in row) for row in rows[:_MAX_ROWS]]
    if len(rows) > _MAX_ROWS:
        lines.append(f"... {len(rows)} rows")
    return "\n".join(lines) or "no rows"


def _cost(result: dict[str, Any]) -> dict[str, object]:
    share = format_share(trained_share(result["trainable_params"], result["total_params"]))
    return {
        "trained": f"{format_count(result['trainable_params'])} parameters, {share} of all",
        "adapter": f"{format_bytes(result['adapter_bytes'])} "
        f"(model: {format_bytes(result['model_bytes'])})",
        "training": f"{format_count(result['training_answers'])} answers in "
        f"{format_duration(result['training_seconds'])}, "
        f"{format_number(round(result['training_tokens_per_s']))} tokens/s",
        "answering": f"{format_number(round(result['evaluation_tokens_per_s']))} tokens/s",
        "peak memory": format_bytes(result["peak_memory_bytes"]),
        "time": format_duration(result["seconds"]),
    }
