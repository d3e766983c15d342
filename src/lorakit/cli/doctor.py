"""`lorakit doctor`: what a config would train on, token by token, before it trains."""

from __future__ import annotations

import argparse
from typing import Any

from rich.panel import Panel
from rich.text import Text

from lorakit.cli import console
from lorakit.data.encode import IGNORED, Example
from lorakit.data.preview import (
    AdapterSummary,
    Finding,
    adapter_finding,
    count_facts,
    data_findings,
    duplicate_finding,
    token_view,
)
from lorakit.errors import RequestError
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.prepare import Preparation, prepare

SUMMARY = "show what a config would train on, before it trains"

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "error": ("error", "red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit doctor`."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a training config, and values to put in its place",
    )
    parser.add_argument("--model", metavar="REF", help="the base, where there is no config")
    parser.add_argument("--data", metavar="DATA", help="the rows, where there is no config")
    parser.add_argument("--examples", type=int, default=2, metavar="N", help="examples to show")
    parser.add_argument(
        "--max-tokens", type=int, default=240, metavar="N", help="tokens to show of each"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the run without loading a weight, and print what was found."""
    config = read_config(args)
    prepared = prepare(config)
    findings = all_findings(config, prepared)
    shown = list(prepared.data.train[: max(0, args.examples)])
    if args.json:
        console.print_json(_record(config, prepared, findings, shown))
    else:
        _show(config, prepared, findings, shown, args.max_tokens)
    return int(any(finding.level == "error" for finding in findings))


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The config from a file or from --model and --data, with the overrides.

    Raises:
        RequestError: neither or both are given.
        ConfigError: the config is wrong.
    """
    words: list[str] = args.config
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    bare = args.model is not None or args.data is not None
    if len(files) > 1 or bool(files) == bare or (bare and None in (args.model, args.data)):
        raise RequestError(
            "one config is needed, or a model and data",
            where="the command line",
            expected="CONFIG.yaml [key=value ...], or --model REF --data DATA [key=value ...]",
            found=" ".join(words) or "no config",
        )
    if files:
        return TrainConfig.from_yaml(files[0], overrides)
    values = {"model": {"ref": args.model}, "data": {"train": args.data}, "output": "runs/doctor"}
    return TrainConfig.from_dict(apply_overrides(TrainConfig, values, overrides))


def all_findings(config: TrainConfig, prepared: Preparation) -> list[Finding]:
    """Everything that was checked, in reading order."""
    data, plan = prepared.data, prepared.plan
    findings = data_findings(data.train.report, prepared.tokenizer, config.data)
    if data.validation_rows is not None:
        findings.append(duplicate_finding(data.train_rows, data.validation_rows))
    summary = AdapterSummary(
        num_sites=len(plan.sites),
        num_params=plan.num_params(),
        num_base_params=prepared.num_base_params,
        notes=plan.notes,
    )
    return [*findings, adapter_finding(summary)]


def _show(
    config: TrainConfig,
    prepared: Preparation,
    findings: list[Finding],
    shown: list[Example],
    max_tokens: int,
) -> None:
    screen = console.stdout()
    rows = prepared.data.train_rows
    console.print_facts(f"{config.data.train} for {config.model.ref}", _facts(prepared))
    screen.print()
    learned = "learned" if screen.is_terminal else "[[learned]]"
    screen.print(Text.assemble((learned, "green"), "   ", ("context, not learned", "dim")))
    for example in shown:
        view = token_view(
            example,
            prepared.tokenizer,
            max_tokens=max_tokens,
            brackets=not screen.is_terminal,
        )
        title = f"{rows.origin(example.row)}: {len(example)} tokens, {example.num_learned} learned"
        screen.print(Panel(view, title=Text(title), title_align="left", border_style="dim"))
    for finding in findings:
        mark, style = _MARKS[finding.level]
        line = Text.assemble((f"{mark:<8}", style), finding.text)
        screen.print(line, highlight=False)
        if finding.remedy:
            screen.print(Text(f"        {finding.remedy}", style="dim"), highlight=False)


def _facts(prepared: Preparation) -> dict[str, str]:
    free = f"{prepared.free_bytes / 1e9:.1f} GB free"
    return count_facts(prepared.data.train.report) | {
        "optimizer steps": f"{prepared.max_steps:,}",
        "memory": f"{prepared.memory}, {free}",
    }


def _record(
    config: TrainConfig, prepared: Preparation, findings: list[Finding], shown: list[Example]
) -> dict[str, Any]:
    plan, data = prepared.plan, prepared.data
    return {
        "model": config.model.ref,
        "data": data.train_rows.to_json(),
        "report": data.train.report.to_json(),
        "adapter": {
            "num_sites": len(plan.sites),
            "num_params": plan.num_params(),
            "num_base_params": prepared.num_base_params,
            "sites": [site.name for site in plan.sites],
        },
        "max_steps": prepared.max_steps,
        "findings": [finding.to_json() for finding in findings],
        "examples": [
            {
                "origin": data.train_rows.origin(example.row),
                "text": str(prepared.tokenizer.decode(example.input_ids)),
                "learned": str(
                    prepared.tokenizer.decode([i for i in example.labels if i != IGNORED])
                ),
                "num_tokens": len(example),
                "num_learned": example.num_learned,
            }
            for example in shown
        ],
    }
