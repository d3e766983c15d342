"""`lorakit eval`: the base and an adapter on the same data, with intervals and p-values."""

from __future__ import annotations

import argparse
from typing import Any

from lorakit.cli import console
from lorakit.cli.eval_classify import run_classify
from lorakit.cli.eval_forgetting import add_forgetting_arguments, run_forgetting
from lorakit.cli.session import add_model_arguments, open_session, task_of
from lorakit.cli.settings import add_row_arguments, sft_options
from lorakit.data.sources import load_rows
from lorakit.errors import RequestError
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.run import EvalResult, evaluate
from lorakit.files import write_json
from lorakit.formatting import format_count, format_duration, format_estimate, format_number

SUMMARY = "compare the base and an adapter on a data file"

_DEFAULT_METRICS = "perplexity,exact_match,token_f1"
_MAX_NEW_TOKENS = 128
# Metrics that are a fraction of something, written in percent.
_SHARES = frozenset({"exact_match", "token_f1", "sql_execution", "choice", "bleu", "rouge_l"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit eval`."""
    parser.add_argument("data", help="a data file, a directory, or a hub id")
    add_model_arguments(parser)
    parser.add_argument(
        "--metrics",
        metavar="A,B,...",
        help=f"what to measure: {', '.join(METRICS)} (default: {_DEFAULT_METRICS}); of a "
        "classifier, all metrics of its task by default",
    )
    add_row_arguments(parser)
    parser.add_argument(
        "--template",
        choices=["auto", "chat", "none"],
        help="chat: the chat template; none: prompt and completion as they are; by default as the "
        "adapter was trained, else auto",
    )
    parser.add_argument(
        "--group-by-prompt",
        action=argparse.BooleanOptionalAction,
        help="rows with the same prompt are one question with several references (default: only "
        "if bleu, rouge_l, nist or cider is measured)",
    )
    parser.add_argument(
        "--choice-normalisation",
        choices=["none", "tokens"],
        help="tokens: compare choices by their likelihood per token (default: none)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"the longest answer, in tokens (default: {_MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows in one forward pass"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    _add_outputs(parser)
    add_forgetting_arguments(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="also write scores and all answers as JSON"
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="of a classifier: also write each row's label and prediction as JSON lines",
    )
    parser.add_argument(
        "--classes",
        metavar="A,B,...",
        help="of a classifier that PEFT saved: the names of its outputs in their order, where the "
        "base does not name them",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print the comparison; returns the exit code."""
    task = task_of(args.adapter, args.model, classes=_names(args.classes or ""))
    if task is not None:
        _refuse_for_classifiers(args)
        return run_classify(
            args, task, load_rows(args.data, split=args.split), _names(args.metrics or "")
        )
    _refuse_for_writers(args)
    sft = sft_options(args, template=args.template)
    tokens = _MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    options = EvalOptions(
        metrics=_names(_DEFAULT_METRICS if args.metrics is None else args.metrics),
        max_new_tokens=tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        group_by_prompt=args.group_by_prompt,
        choice_normalisation=args.choice_normalisation or "none",
        sft=sft,
    )
    rows = load_rows(args.data, split=args.split)
    if args.beside or args.held_out:
        return run_forgetting(args, rows, options)
    session = open_session(args)
    result = evaluate(session.model, session.tokenizer, rows, options, systems=session.systems)
    record: dict[str, Any] = {
        "model": session.ref,
        "adapter": args.adapter,
        "data": rows.to_json(),
        "settings": {
            "columns": dict(sft.columns),
            "template": sft.template,
            "chat_template": sft.chat_template,
            "template_options": dict(sft.template_options),
            "system": sft.system,
        },
        **result.to_json(),
    }
    if args.output:
        write_json(args.output, record)
    if args.json:
        console.print_json(record if args.output is None else {**record, "outputs": args.output})
    else:
        _show(result, rows.source)
    return 0


def _refuse_for_writers(args: argparse.Namespace) -> None:
    given = {"--predictions": args.predictions, "--classes": args.classes}
    named = [flag for flag, value in given.items() if value is not None]
    if named:
        raise RequestError(
            f"{' and '.join(named)} is for classifiers",
            where="the command line",
            expected="an adapter trained with task: classify",
            remedy="for the answers of a model that writes text: -o FILE",
        )


def _refuse_for_classifiers(args: argparse.Namespace) -> None:
    if args.beside or args.held_out:
        raise RequestError(
            "what was forgotten is measured as the perplexity of text, which a classifier cannot "
            "write",
            where="the command line, --beside and --held-out",
            expected="an adapter trained with task: sft",
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _show(result: EvalResult, source: str) -> None:
    others = [name for name in result.systems if name != result.baseline]
    columns = ["metric", *result.systems, *(f"{name} - {result.baseline}" for name in others)]
    columns += ["p"] if others else []
    table = console.table(
        f"{source}: {format_count(result.num_rows)} rows", columns, numbers=columns[1:]
    )
    for metric in result.systems[result.baseline].scores:
        share = metric in _SHARES
        cells = [metric + ("" if METRICS[metric].higher_is_better else " (lower is better)")]
        for system in result.systems.values():
            cells.append(format_estimate(system.scores[metric].to_json(), share=share))
        for name in others:
            found = result.differences[name][metric].to_json()
            cells.append(format_estimate(found, share=share))
            cells.append(p_text(found["p_value"]))
        table.add_row(*cells)
    console.stdout().print(table)
    console.note("in brackets: 95 % intervals; p: probability of such a difference by chance")
    for name, system in result.systems.items():
        rate = system.tokens_per_s
        speed = f", {format_number(round(rate))} tokens/s" if rate is not None else ""
        console.note(f"{name}: {format_duration(system.seconds)}{speed}")


def p_text(p_value: float) -> str:
    """A p-value as it is written in tables."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
