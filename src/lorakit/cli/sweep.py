"""`lorakit sweep`: many adapters over one base in one batch."""

from __future__ import annotations

import argparse

from lorakit.cli import console
from lorakit.cli.fields import one_file, show_fields
from lorakit.formatting import format_count
from lorakit.report.sweeps import sweep_table
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.plan import SweepPlan, plan_sweep
from lorakit.sweep.run import SweepResult, require_engine, sweep

SUMMARY = "train many adapters over one base in one batch, and keep the best"
_PLAIN_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit sweep`."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a training config with a section `sweep`, and values to put in its place (lora.r=4, "
        "sweep.together=4)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show arms, parameters, steps and memory, and leave"
    )
    parser.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="where the arms are trained: local, this process, or ray, the machines of a cluster",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="of ray: its processes (default: one for each GPU, or else for each machine)",
    )
    parser.add_argument(
        "--fields", action="store_true", help="list every key of the config, and leave"
    )


def run(args: argparse.Namespace) -> int:
    """Sweep, and print the table; returns the exit code."""
    if args.fields:
        show_fields("keys of a sweep", SweepConfig.fields(), as_json=args.json)
        return 0
    require_engine(args.engine, args.workers)
    config = read_config(args.config)
    if args.dry_run:
        _show_plan(plan_sweep(config), as_json=args.json)
        return 0
    result = sweep(config, say=console.note, engine=args.engine, workers=args.workers)
    if args.json:
        best = None if result.best is None else str(result.best)
        found = {"directory": str(result.directory), **result.document}
        console.print_json({**found, "best_adapter": best})
    else:
        _show(result)
    return 0


def read_config(words: list[str]) -> SweepConfig:
    """The config from "CONFIG.yaml key=value ...".

    Raises:
        RequestError: not exactly one file.
        ConfigError: the config is wrong.
    """
    file, overrides = one_file(words, verb="sweep")
    return SweepConfig.from_yaml(file, overrides)


def _show_plan(plan: SweepPlan, *, as_json: bool) -> None:
    if as_json:
        console.print_json(plan.to_json())
        return
    table = console.table(None, ["arm", "trained", "steps"], numbers=["trained", "steps"])
    for arm in plan.arms:
        prepared = plan.prepared[arm.name]
        table.add_row(
            arm.name, format_count(prepared.plan.num_trainable), f"{prepared.max_steps:,}"
        )
    console.stdout().print(table)
    for line in plan.lines():
        console.note(line)


def _show(result: SweepResult) -> None:
    found = sweep_table(result.document)
    table = console.table(result.document["title"], found["columns"], numbers=found["columns"][2:])
    for row in found["rows"]:
        table.add_row(*row)
    out = console.stdout()
    if not out.is_terminal:
        out.width = _PLAIN_WIDTH
    out.print(table)
    console.note(found.get("note", ""))
    console.note(f"written: {result.directory}/sweep.json, report.html, arms/")
    if result.best is not None:
        console.note(f"the best adapter: {result.best}")
