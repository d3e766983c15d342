"""`lorakit train`: an adapter from a YAML config and overrides."""

from __future__ import annotations

import argparse
from typing import Any

from lorakit.cli import console
from lorakit.cli.fields import at_most_one_file, show_fields
from lorakit.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_share,
)
from lorakit.processes import processes
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.run import TrainResult, train

SUMMARY = "train an adapter from a YAML config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit train`."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a training config, and values to put in its place (train.lr=1e-4, or lr=1e-4)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in the output directory",
    )
    parser.add_argument(
        "--fields", action="store_true", help="list every key of the config, and leave"
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print what the run left; returns the exit code."""
    if args.fields:
        show_fields("keys of a training config", TrainConfig.fields(), as_json=args.json)
        return 0
    with processes() as group:
        config = group.everywhere(lambda: read_config(args.config))
        result = train(config, resume=args.resume, say=console.note)
    if not group.is_first:
        return 0
    if args.json:
        console.print_json({"directory": str(result.directory), **result.record})
    else:
        _show(result)
    return 0


def read_config(words: list[str]) -> TrainConfig:
    """The config from "CONFIG.yaml key=value ..."; without a file the overrides must be enough.

    Raises:
        RequestError: more than one file, or nothing at all.
        ConfigError: the config is wrong.
    """
    file, overrides = at_most_one_file(words, verb="train")
    if file is None:
        return TrainConfig.from_dict(apply_overrides(TrainConfig, {}, overrides))
    return TrainConfig.from_yaml(file, overrides)


def _show(result: TrainResult) -> None:
    record: dict[str, Any] = result.record
    adapter, final = record["adapter"], record["metrics"]["final"]
    facts: dict[str, object] = {
        "adapter": f"{result.adapter} ({format_bytes(adapter['bytes'])})",
        "trained": f"{format_count(adapter['trainable_params'])} parameters "
        f"({format_share(adapter['trainable_share'])})",
        "training loss": format_number(final["train_loss"]),
    }
    if final["eval_loss"] is not None:
        facts["validation loss"] = format_number(final["eval_loss"])
    for name, value in final.items():
        if name.startswith("eval_") and name != "eval_loss":
            facts[f"validation {name.removeprefix('eval_')}"] = format_number(value)
    facts["time"] = format_duration(record["timing"]["total_s"])
    console.print_facts(f"trained to step {final['step']}", facts)
    console.note(f"next: lorakit report {result.directory}")
