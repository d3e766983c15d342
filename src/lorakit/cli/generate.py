"""`lorakit generate`: greedy answers to one prompt, or to a file of prompts."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.text import Text

from lorakit.cli import console
from lorakit.cli.session import Session, add_model_arguments, open_session, require_writer
from lorakit.cli.settings import add_row_arguments, sft_options
from lorakit.data.rows import Rows
from lorakit.data.sft import question_text, render_prompt
from lorakit.data.sources import load_rows
from lorakit.errors import RequestError
from lorakit.evaluate.generate import Answer, generate_answers
from lorakit.formatting import format_duration

SUMMARY = "answer one prompt, or a file of prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit generate`."""
    parser.add_argument("prompt", nargs="?", help="the prompt, one user turn")
    add_model_arguments(parser)
    parser.add_argument("--file", metavar="DATA", help="answer every row of a data file instead")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of the file")
    add_row_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="no chat template: continue the text")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="the longest answer, in tokens"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts answered together"
    )
    parser.add_argument(
        "--compare", action="store_true", help="let the base answer too, beside the adapter"
    )


def run(args: argparse.Namespace) -> int:
    """Answer, and print each answer; returns the exit code."""
    if args.compare and args.adapter is None:
        raise RequestError(
            "--compare lets the base answer beside an adapter, and there is none",
            where="the command line",
            remedy="give --adapter DIR, or leave --compare out",
        )
    require_writer(args.adapter)
    rows = _rows(args)
    options = sft_options(args, template="none" if args.plain else None, file=args.file is not None)
    session = open_session(args)
    prompts = [
        render_prompt(row, session.tokenizer, options, where=rows.origin(index))
        for index, row in enumerate(rows)
    ]
    systems = session.systems if args.compare else dict([list(session.systems.items())[-1]])
    started = time.monotonic()
    answers = {label: _answers(session, label, prompts, args) for label in systems}
    seconds = time.monotonic() - started
    asked = [question_text(row, options, where=rows.origin(i)) for i, row in enumerate(rows)]
    if args.json:
        given = [str(session.tokenizer.decode(p, skip_special_tokens=True)) for p in prompts]
        console.print_json(_record(session, rows, asked, given, answers, seconds))
    else:
        _show(asked if args.file else [], answers, seconds)
    return 0


def _rows(args: argparse.Namespace) -> Rows:
    if (args.prompt is None) == (args.file is None):
        raise RequestError(
            "one prompt is needed, or one file of prompts",
            where="the command line",
            expected="PROMPT, or --file DATA",
            found="both" if args.prompt is not None else "neither",
        )
    if args.file is None and (args.column or args.split is not None):
        raise RequestError(
            "--column and --split say how a file is read, and there is none",
            where="the command line",
            remedy="give --file DATA, or leave them out",
        )
    if args.max_new_tokens < 1 or args.batch_size < 1:
        raise RequestError(
            "--max-new-tokens and --batch-size must be at least 1", where="the command line"
        )
    if args.file is not None:
        return load_rows(args.file, split=args.split, limit=args.limit)
    return load_rows([{"prompt": args.prompt}])


def _answers(
    session: Session, system: str, prompts: list[list[int]], args: argparse.Namespace
) -> list[Answer]:
    with session.systems[system]():
        return generate_answers(
            session.model,
            session.tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            label=f"answering, {system}",
        )


def _record(
    session: Session,
    rows: Rows,
    asked: list[str],
    given: list[str],
    answers: dict[str, list[Answer]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "model": session.ref,
        "data": rows.source,
        "answers": [
            {
                "origin": rows.origin(index),
                "question": asked[index],
                "prompt": given[index],
                **{
                    label: {
                        "text": found[index].text,
                        "num_tokens": found[index].num_tokens,
                        "finished": found[index].finished,
                    }
                    for label, found in answers.items()
                },
            }
            for index in range(len(rows))
        ],
        "seconds": round(seconds, 3),
    }


def _show(asked: list[str], answers: dict[str, list[Answer]], seconds: float) -> None:
    """Print the answers, below what was asked; a prompt from the command line is not repeated."""
    labelled = len(answers) > 1
    if not asked and not labelled:
        (found,) = answers.values()
        console.print_text(found[0].text)
    else:
        for index, texts in enumerate(zip(*answers.values(), strict=True)):
            if asked:
                console.stdout().print(Text(asked[index], style="dim"))
            for label, answer in zip(answers, texts, strict=True):
                prefix = f"{label}: " if labelled else ""
                console.stdout().print(Text(prefix, style="bold") + Text(answer.text))
            console.stdout().print()
    everything = [answer for found in answers.values() for answer in found]
    num_tokens = sum(answer.num_tokens for answer in everything)
    console.note(
        f"{num_tokens:,} tokens in {format_duration(seconds)} ({num_tokens / seconds:.0f} tokens/s)"
    )
    cut = sum(not answer.finished for answer in everything)
    if cut:
        console.note(f"{cut} of {len(everything)} answers were cut at --max-new-tokens")
