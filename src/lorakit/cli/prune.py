"""`lorakit prune`: smaller ranks after training, and what they cost."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.prune import Pruned, prune_adapter
from lorakit.cli import console
from lorakit.cli.session import base_of, require_writer
from lorakit.cli.settings import add_row_arguments, sft_options
from lorakit.data.sources import load_rows
from lorakit.errors import LorakitWarning, RequestError
from lorakit.evaluate.options import EvalOptions
from lorakit.evaluate.run import EvalResult, evaluate
from lorakit.files import require_free
from lorakit.formats.peft import read_adapter, write_adapter
from lorakit.formatting import format_count, format_estimate, format_share
from lorakit.methods.files import read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.models.load import load_model

SUMMARY = "cut an adapter's ranks down, and measure what that costs"

_SYSTEMS = {"adapter": "adapter", "pruned": "pruned", "base": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit prune`."""
    parser.add_argument("adapter", help="an adapter's directory")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where to; must not exist yet, or be empty",
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="what may stay: parameters (400000, 400k, 1.5M) or bytes ('1.5 MB', '64 KiB')",
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="what must stay of the sum of squared singular values, 0 to 1",
    )
    parser.add_argument(
        "--data", metavar="ROWS", help="measure perplexity on these rows, before and after"
    )
    add_row_arguments(parser)
    parser.add_argument(
        "--template",
        choices=["auto", "chat", "none"],
        help="chat: the chat template; none: prompt and completion as they are; by default as the "
        "adapter was trained, else auto",
    )
    parser.add_argument(
        "--model",
        "--base",
        metavar="REF",
        help="the base; by default the one that the adapter names",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="even if it was trained on another base"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows in one forward pass"
    )


def run(args: argparse.Namespace) -> int:
    """Prune, measure, write and print; returns the exit code."""
    saved = read_saved(args.adapter)
    if saved.name != LoraMethod.name:
        raise RequestError(
            f"what {saved.name} learned is not a low-rank update",
            where=args.adapter,
            expected="an adapter in PEFT's layout",
        )
    require_free(args.output)
    if args.data:
        require_writer(args.adapter)
    else:
        _refuse_unmeasured(args)
    adapter = read_adapter(Path(args.adapter))
    pruned = prune_adapter(adapter, budget=args.budget, energy=args.energy)
    measured = _measure(args, adapter, pruned) if args.data else None
    write_adapter(pruned.adapter, Path(args.output))
    if args.json:
        console.print_json(_record(args, pruned, measured))
    else:
        _show(args.output, pruned, measured)
    return 0


def _refuse_unmeasured(args: argparse.Namespace) -> None:
    names = ("split", "column", "system", "template", "model", "any_base", "limit")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if given:
        raise RequestError(
            "nothing is measured, so there is nothing that this could say",
            where="the command line",
            expected="--data ROWS beside it",
            found=", ".join(given),
        )


def _measure(args: argparse.Namespace, adapter: Adapter, pruned: Pruned) -> EvalResult:
    rows = load_rows(args.data, split=args.split)
    options = EvalOptions(
        metrics=("perplexity",),
        batch_size=args.batch_size,
        limit=args.limit,
        sft=sft_options(args, template=args.template),
    )
    model, tokenizer = load_model(args.model or base_of(args.adapter))
    with warnings.catch_warnings():
        # Whatever there is to say about the adapter is said once.
        bind_adapter(model, adapter, "adapter", any_base=args.any_base)
        warnings.simplefilter("ignore", LorakitWarning)
        bind_adapter(model, pruned.adapter, "pruned", any_base=args.any_base)
    return evaluate(model, tokenizer, rows, options, systems=_SYSTEMS)


def _record(
    args: argparse.Namespace, pruned: Pruned, measured: EvalResult | None
) -> dict[str, Any]:
    before, after = pruned.num_params
    return {
        "adapter": args.adapter,
        "output": str(Path(args.output)),
        "num_params": {"before": before, "after": after},
        "relative_error": pruned.error,
        "sites": [
            {"site": site, "r": ranks[0], "kept": ranks[1], "relative_error": pruned.errors[site]}
            for site, ranks in pruned.ranks.items()
        ],
        "measured": None if measured is None else measured.to_json(max_outputs=0),
    }


def _show(output: str, pruned: Pruned, measured: EvalResult | None) -> None:
    before, after = pruned.num_params
    ranks = [kept for _, kept in pruned.ranks.values()]
    facts: dict[str, object] = {
        "parameters": f"{format_count(after)} of {format_count(before)} "
        f"({format_share(after / before)})",
        "ranks": f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}",
        "error of the update": f"{format_share(pruned.error)} of its Frobenius norm",
    }
    if measured is not None:
        for name, system in measured.systems.items():
            score = format_estimate(system.scores["perplexity"].to_json(), share=False)
            facts[f"perplexity, {name}"] = score
        change = measured.differences["pruned"]["perplexity"].to_json()
        facts["perplexity, pruned - adapter"] = (
            f"{format_estimate(change, share=False)}, p {change['p_value']:.3f}"
        )
    console.print_facts("pruned", facts)
    console.print_text(output)
