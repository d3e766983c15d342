"""`lorakit eval` for what was trained with `task: classify`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lorakit.cli import console
from lorakit.cli.session import open_classifier
from lorakit.cli.settings import named_columns
from lorakit.data.rows import Rows
from lorakit.data.task_facts import ClassifyTask
from lorakit.errors import RequestError
from lorakit.evaluate.classify import (
    SYSTEM,
    ClassifyEvalOptions,
    ClassifyResult,
    chosen_metrics,
    evaluate_classifier,
)
from lorakit.files import write_json, write_text
from lorakit.formatting import (
    format_count,
    format_duration,
    format_estimate,
    format_number,
    format_share,
)

_SHARES = frozenset({"accuracy", "f1", "macro_f1", "accuracy_f1"})


def run_classify(
    args: argparse.Namespace, task: ClassifyTask, rows: Rows, metrics: tuple[str, ...]
) -> int:
    """Measure a classifier, and print or write what was found; returns the exit code.

    Args:
        args: of `lorakit eval`.
        task: what the adapter was trained on.
        rows: the data.
        metrics: names; empty for all of the task.

    Raises:
        RequestError: a flag that means nothing for a classifier.
    """
    _refuse_other_flags(args)
    options = ClassifyEvalOptions(
        metrics=chosen_metrics(task, metrics),
        columns=named_columns(args.column),
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
    )
    session = open_classifier(args, task)
    result = evaluate_classifier(session.model, session.tokenizer, rows, task, options)
    record: dict[str, Any] = {
        "model": session.ref,
        "adapter": args.adapter,
        "data": rows.to_json(),
        "settings": {"columns": {**task.columns, **(options.columns or {})}},
        **result.to_json(),
    }
    if args.predictions:
        lines = [json.dumps(found, ensure_ascii=False) for found in result.predictions]
        write_text(args.predictions, "\n".join(lines) + "\n")
        record["predictions"] = args.predictions
    if args.output:
        write_json(args.output, record)
    if args.json:
        console.print_json(record)
    else:
        _show(result, rows.source)
    return 0


def _refuse_other_flags(args: argparse.Namespace) -> None:
    given = {
        "--template": args.template is not None,
        "--system": args.system is not None,
        "--group-by-prompt": args.group_by_prompt is not None,
        "--choice-normalisation": args.choice_normalisation is not None,
        "--max-new-tokens": args.max_new_tokens is not None,
    }
    named = [flag for flag, is_given in given.items() if is_given]
    if named:
        raise RequestError(
            f"{', '.join(named)} means nothing for a classifier",
            where="the command line",
            expected="an adapter that writes text",
            found=f"{args.adapter}, task: classify",
            remedy="leave it out",
        )


def _show(result: ClassifyResult, source: str) -> None:
    columns = ["metric", result.baseline, SYSTEM]
    if result.differences:
        columns += [f"{SYSTEM} - {result.baseline}", "p"]
    num_rows = format_count(len(result.predictions))
    table = console.table(f"{source}: {num_rows} rows", columns, numbers=columns[1:])
    for metric, found in result.scores[SYSTEM].items():
        share = metric in _SHARES
        base = result.scores[result.baseline][metric]
        cells = [metric, *(format_estimate(e.to_json(), share=share) for e in (base, found))]
        if result.differences:
            other = result.differences[metric].to_json()
            p_value = other["p_value"]
            cells.append(format_estimate(other, share=share))
            cells.append("< 0.001" if p_value < 0.001 else f"{p_value:.3f}")
        table.add_row(*cells)
    console.stdout().print(table)
    if result.classes:
        _show_classes(result)
    console.note("in brackets: 95 % intervals; p: probability of such a difference by chance")
    if isinstance(result.constant, str):
        console.note(
            f"the base has no trained head: beside it stands {result.constant!r} for every row, "
            "the most frequent class here"
        )
    else:
        console.note(
            "the base has no trained head: beside it stands the mean label, "
            f"{format_number(result.constant)}, for every row; a constant correlates with nothing"
        )
    for text in result.notes:
        console.note(text)
    console.note(f"{SYSTEM}: {format_duration(result.seconds)}")


def _show_classes(result: ClassifyResult) -> None:
    columns = ["class", "rows", "predicted", "precision", "recall"]
    table = console.table("classes", columns, numbers=columns[1:])
    for found in result.classes:
        shares = ("-" if s is None else format_share(s) for s in (found.precision, found.recall))
        counts = (format_count(found.count), format_count(found.predicted))
        table.add_row(found.name, *counts, *shares)
    console.stdout().print(table)
