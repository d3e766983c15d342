"""`lorakit doctor`: what a config would train on, token by token, before it trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich.panel import Panel
from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.cli import console
from lorakit.cli.fields import split_words
from lorakit.cli.numbers import count
from lorakit.data.builder import Examples, LossMaskError
from lorakit.data.encode import IGNORED, Example
from lorakit.data.preview import (
    Finding,
    count_facts,
    data_findings,
    duplicate_finding,
    token_view,
)
from lorakit.data.rows import Rows
from lorakit.errors import RequestError
from lorakit.formatting import format_bytes, format_count, format_share
from lorakit.methods.base import TrainableReport
from lorakit.models.load import load_tokenizer
from lorakit.train.config import TrainConfig
from lorakit.train.overrides import apply_overrides
from lorakit.train.prepare import Preparation, prepare

SUMMARY = "show what a config would train on, before it trains"

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "error": ("error", "red")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What is shown.

    Attributes:
        rows: the training rows, or the validation rows if those are what cannot be used.
        examples: what became of them.
        tokenizer: of the base.
        findings: everything that was checked.
        prepared: the run; None if it would be refused.
    """

    rows: Rows
    examples: Examples
    tokenizer: PreTrainedTokenizerBase
    findings: list[Finding]
    prepared: Preparation | None = None


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
    parser.add_argument("--examples", type=count, default=2, metavar="N", help="examples to show")
    parser.add_argument(
        "--max-tokens", type=count, default=240, metavar="N", help="tokens to show of each"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the run without loading a weight, and print what was found.

    Returns:
        1 if a finding is an error: the run would be refused; else 0.
    """
    config = read_config(args)
    if config.task != "sft":
        return _run_labelled(config, as_json=args.json)
    try:
        seen = _look(config, prepare(config))
    except LossMaskError as error:
        seen = _look_at_failure(config, error)
    shown = list(seen.examples[: max(0, args.examples)])
    if args.json:
        console.print_json(_record(config, seen, shown))
    else:
        _show(config, seen, shown, args.max_tokens)
    return int(any(finding.level == "error" for finding in seen.findings))


def _run_labelled(config: TrainConfig, *, as_json: bool) -> int:
    """The same for a task whose rows have labels or preferences, not learned tokens."""
    prepared = prepare(config)
    data, report = prepared.data, prepared.data.train.report
    findings = [Finding(level="warning", text=note) for note in report.notes]
    if data.validation_rows is not None:
        findings.append(duplicate_finding(data.train_rows, data.validation_rows))
    findings.append(plan_finding(config.method, prepared.plan, prepared.notes()))
    if as_json:
        record = {"model": config.model.ref, "data": data.train_rows.to_json()}
        found = [finding.to_json() for finding in findings]
        plan = _plan_record(prepared)
        console.print_json({**record, "report": report.to_json(), **plan, "findings": found})
        return 0
    facts = {
        "rows": prepared.objective.line(data.train),
        "tokens": f"{report.num_tokens:,}, longest row {report.longest}",
        "optimizer steps": f"{prepared.max_steps:,}",
        "memory": f"{prepared.memory}, {format_bytes(prepared.free_bytes)} free",
    }
    console.print_facts(f"{data.train_rows.source} for {config.model.ref}", facts)
    _show_findings(findings)
    return 0


def _look(config: TrainConfig, prepared: Preparation) -> _Seen:
    return _Seen(
        rows=prepared.data.train_rows,
        examples=cast(Examples, prepared.data.train),
        tokenizer=prepared.tokenizer,
        findings=all_findings(config, prepared),
        prepared=prepared,
    )


def _look_at_failure(config: TrainConfig, error: LossMaskError) -> _Seen:
    """What can be shown of rows that cannot be trained on."""
    if error.rows is None or error.examples is None:
        raise error
    tokenizer = load_tokenizer(config.model.ref)
    text = f"{error.what} ({error.where}: {error.found})"
    found = Finding(level="error", text=text, remedy=error.remedy or "")
    others = data_findings(error.examples.report, tokenizer, config.data)
    return _Seen(
        rows=error.rows, examples=error.examples, tokenizer=tokenizer, findings=[found, *others]
    )


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The config from a file or from --model and --data, with the overrides.

    Raises:
        RequestError: neither or both are given.
        ConfigError: the config is wrong.
    """
    words: list[str] = args.config
    files, overrides = split_words(words)
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
    data = prepared.data
    report = cast(Examples, data.train).report
    findings = data_findings(report, prepared.tokenizer, config.data)
    if data.validation_rows is not None:
        findings.append(duplicate_finding(data.train_rows, data.validation_rows))
    return [*findings, plan_finding(config.method, prepared.plan, prepared.notes())]


def plan_finding(method: str, plan: TrainableReport, notes: Sequence[str]) -> Finding:
    """What the method trains, in one line."""
    text = (
        f"{method} trains {format_count(plan.num_trainable)} of {format_count(plan.num_total)} "
        f"parameters ({format_share(plan.share)} of all) at {len(plan.sites):,} places"
    )
    if notes:
        return Finding(level="warning", text=f"{text}; {'; '.join(notes)}")
    return Finding(level="ok", text=text)


def _show(config: TrainConfig, seen: _Seen, shown: list[Example], max_tokens: int) -> None:
    screen = console.stdout()
    console.print_facts(f"{seen.rows.source} for {config.model.ref}", _facts(seen))
    screen.print()
    learned = "learned" if screen.is_terminal else "[[learned]]"
    screen.print(Text.assemble((learned, "green"), "   ", ("context, not learned", "dim")))
    for example in shown:
        view = token_view(
            example,
            seen.tokenizer,
            max_tokens=max_tokens,
            brackets=not screen.is_terminal,
        )
        title = (
            f"{seen.rows.origin(example.row)}: {len(example)} tokens, {example.num_learned} learned"
        )
        screen.print(Panel(view, title=Text(title), title_align="left", border_style="dim"))
    _show_findings(seen.findings)


def _show_findings(findings: Sequence[Finding]) -> None:
    screen = console.stdout()
    for finding in findings:
        mark, style = _MARKS[finding.level]
        line = Text.assemble((f"{mark:<8}", style), finding.text)
        screen.print(line, highlight=False)
        if finding.remedy:
            screen.print(Text(f"        {finding.remedy}", style="dim"), highlight=False)


def _facts(seen: _Seen) -> dict[str, str]:
    facts, prepared = count_facts(seen.examples.report), seen.prepared
    if prepared is None:
        return facts
    free = f"{format_bytes(prepared.free_bytes)} free"
    return facts | {
        "optimizer steps": f"{prepared.max_steps:,}",
        "memory": f"{prepared.memory}, {free}",
    }


def _record(config: TrainConfig, seen: _Seen, shown: list[Example]) -> dict[str, Any]:
    decode = seen.tokenizer.decode
    return {
        "model": config.model.ref,
        "data": seen.rows.to_json(),
        "report": seen.examples.report.to_json(),
        **_plan_record(seen.prepared),
        "findings": [finding.to_json() for finding in seen.findings],
        "examples": [
            {
                "origin": seen.rows.origin(example.row),
                "text": str(decode(example.input_ids)),
                "learned": str(decode([i for i in example.labels if i != IGNORED])),
                "num_tokens": len(example),
                "num_learned": example.num_learned,
            }
            for example in shown
        ],
    }


def _plan_record(prepared: Preparation | None) -> dict[str, Any]:
    if prepared is None:
        return {"adapter": None, "max_steps": None}
    plan = prepared.plan
    return {
        "adapter": {
            "num_sites": len(plan.sites),
            "num_params": plan.num_trainable,
            "num_base_params": prepared.num_base_params,
            "trainable_share": plan.share,
            "sites": list(plan.sites),
        },
        "max_steps": prepared.max_steps,
    }
