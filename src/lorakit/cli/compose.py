"""`lorakit compose`: several adapters into one, with what it costs said before and after."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters.composition.recipe import WAYS, Recipe
from lorakit.cli import console
from lorakit.cli.eval import p_text
from lorakit.cli.parser import add_list_below
from lorakit.cli.settings import add_row_arguments, named_columns, trained_settings
from lorakit.composing.measure import PartTask
from lorakit.composing.run import ComposeRequest, Tuning, compose_to_disk, read_parts
from lorakit.data.options import SftOptions
from lorakit.data.sources import load_rows
from lorakit.errors import RequestError
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.formatting import format_count, format_estimate, format_number, format_share

SUMMARY = "compose several adapters into one"

_NUM_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit compose`."""
    parser.add_argument(
        "parts",
        nargs="+",
        metavar="DIR[=WEIGHT]",
        help="adapters with their weights, as in runs/sql/adapter=0.7; a weight may be negative; "
        "without one it is 1, or equal shares where --tune chooses",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="where to; must not exist yet, or be empty",
    )
    parser.add_argument(
        "--how", default="cat", metavar="WAY", help="how; the ways are listed below"
    )
    add_list_below(parser, "ways", {name: way.about for name, way in WAYS.items()})
    parser.add_argument("-r", type=int, metavar="N", help="the rank of the result")
    parser.add_argument(
        "--density",
        type=float,
        metavar="SHARE",
        help="share of the numbers that is kept, 0 to 1, where a way thins out (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of dare and dare_ties")
    parser.add_argument(
        "--base",
        "--model",
        dest="base",
        metavar="REF",
        help="the base, checked against the adapters; by default the one that they name, loaded "
        "only where it is needed",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="compose adapters of different bases"
    )
    _add_measuring(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune", metavar="DATA", help="choose the weights on these validation rows"
    )
    parser.add_argument(
        "--max-trials", type=int, default=24, metavar="N", help="of --tune: compositions tried"
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        default=[],
        metavar="DATA",
        help="one data file per part, in their order: each part's task before and after",
    )
    parser.add_argument(
        "--metrics",
        default="perplexity",
        metavar="A,B,...",
        help=f"of --measure: {', '.join(METRICS)}",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="of --measure: the longest answer, in tokens",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows in one forward pass"
    )
    add_row_arguments(parser)
    parser.add_argument(
        "--template",
        choices=["auto", "chat", "none"],
        help="chat: the chat template; none: prompt and completion as they are; by default as the "
        "adapter was trained, else auto",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        help="load the base as this; by default float32 on a CPU, bfloat16 on CUDA",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Compose and print; returns the exit code."""
    recipe = Recipe(
        how=args.how, r=args.r, density=args.density, seed=args.seed, any_base=args.any_base
    )
    paths, weights = _paths_and_weights(args)
    if args.measure and len(args.measure) != len(paths):
        raise RequestError(
            "--measure needs one data file per part",
            where="the command line",
            expected=f"{len(paths)} files, in the order of the parts",
            found=str(len(args.measure)),
        )
    parts = read_parts(paths, weights)
    settings = [_row_settings(args, path) for path in paths]
    tasks = [
        PartTask(part.name, load_rows(data, split=args.split), _eval_options(args, rows))
        for part, data, rows in zip(parts, args.measure, settings, strict=bool(args.measure))
    ]
    record = compose_to_disk(
        ComposeRequest(
            parts=parts,
            recipe=recipe,
            output=Path(args.output),
            base=args.base,
            tuning=_tuning(args, settings),
            tasks=tasks,
            dtype=args.dtype,
            device=args.device,
        )
    )
    if args.json:
        console.print_json(record)
    else:
        _show(record)
    return 0


def _paths_and_weights(args: argparse.Namespace) -> tuple[list[Path], list[float]]:
    paths: list[Path] = []
    weights: list[float] = []
    for text in args.parts:
        path, equals, weight = text.rpartition("=")
        if not equals or Path(text).exists():
            path, weight = text, str(1 / len(args.parts) if args.tune else 1.0)
        try:
            weights.append(float(weight))
        except ValueError:
            raise RequestError(
                "a weight must be a number",
                where=text,
                expected="DIR=WEIGHT, as in runs/sql/adapter=0.7",
                found=repr(weight),
            ) from None
        paths.append(Path(path))
    return paths, weights


def _row_settings(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """How rows are read: the flags, else as this part was trained."""
    given: dict[str, Any] = {}
    if args.column:
        given["columns"] = named_columns(args.column)
    if args.template is not None:
        given["template"] = args.template
    if args.system is not None:
        given["system"] = args.system or None
    return {**trained_settings(str(path)), **given}


def _eval_options(args: argparse.Namespace, settings: Mapping[str, Any]) -> EvalOptions:
    names = tuple(name.strip() for name in args.metrics.split(",") if name.strip())
    return EvalOptions(
        metrics=names,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        sft=SftOptions(**settings),
    )


def _tuning(args: argparse.Namespace, settings: Sequence[Mapping[str, Any]]) -> Tuning | None:
    if args.tune is None:
        return None
    alike = {
        key: value
        for key, value in settings[0].items()
        if all(key in other and other[key] == value for other in settings)
    }
    return Tuning(
        rows=load_rows(args.tune, split=args.split, limit=args.limit),
        sft=SftOptions(**alike),
        max_trials=args.max_trials,
        batch_size=args.batch_size,
    )


def _show(record: Mapping[str, Any]) -> None:
    _show_prediction(record)
    if record["tuned"]:
        _show_tuned(record["tuned"])
    ranks = sorted({site["r"] for site in record["sites"]})
    how = record["how"] + (f", density {record['density']:g}" if record["density"] < 1 else "")
    facts = {
        "parts": ", ".join(f"{part['name']} x {part['weight']:g}" for part in record["parts"]),
        "how": how,
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "size": f"{format_count(record['num_params'])} parameters at {len(record['sites'])} sites",
        "discarded": format_share(record["relative_error"]) + " of the wanted change, in norm"
        if record["relative_error"]
        else "nothing: it is exact",
    }
    console.print_facts("composed", facts)
    if record["relative_error"]:
        _show_errors(record["sites"])
    for task in record["measured"]:
        _show_task(task)
    console.print_text(f"{record['output']}: adapter and passport")


def _show_prediction(record: Mapping[str, Any]) -> None:
    if not record["predicted"]:
        return
    columns = ["pair", "shared sites", "overlap in", "overlap out", "cosine", "sign conflict"]
    table = console.table("interference, predicted", columns, numbers=columns[1:])
    for pair in record["predicted"]:
        mean = pair["mean"]
        cells = [f"{pair['first']} and {pair['second']}"]
        cells.append(f"{pair['shared_sites']} of {pair['all_sites']}")
        if mean is None:
            cells += ["none"] * 4
        else:
            cells.append(f"{mean['overlap_in']:.2f} (chance {mean['chance_in']:.2f})")
            cells.append(f"{mean['overlap_out']:.2f} (chance {mean['chance_out']:.2f})")
            cells += [f"{mean['cosine']:+.3f}", f"{mean['sign_conflict']:.2f} (chance 0.50)"]
        table.add_row(*cells)
    console.stdout().print(table)


def _show_tuned(tuned: Mapping[str, Any]) -> None:
    table = console.table(
        f"weights, chosen by perplexity in {len(tuned['trials'])} trials",
        ["weights", "perplexity"],
        numbers=["perplexity"],
    )
    table.add_row("base", format_number(tuned["base"]))
    for name, value in tuned["alone"].items():
        table.add_row(f"{name} alone", format_number(value))
    chosen = ", ".join(f"{name} {weight:g}" for name, weight in tuned["weights"].items())
    table.add_row(f"chosen: {chosen}", format_number(tuned["perplexity"]))
    console.stdout().print(table)
    if tuned["perplexity"] >= min(tuned["alone"].values()):
        console.warn("no composition was better on these rows than one part alone")


def _show_errors(sites: Sequence[Mapping[str, Any]]) -> None:
    worst = sorted(sites, key=lambda site: -site["error"])[:_NUM_SHOWN]
    columns = ["site", "rank", "norm", "discarded"]
    table = console.table("largest errors", columns, numbers=columns[1:])
    for site in worst:
        share = format_share(site["error"] / site["norm"]) if site["norm"] else "0 %"
        table.add_row(site["name"], str(site["r"]), format_number(site["norm"]), share)
    console.stdout().print(table)


def _show_task(task: Mapping[str, Any]) -> None:
    columns = ["metric", "base", task["part"], "composed", "composed - part", "p"]
    table = console.table(
        f"{task['part']}: {task['data']}, {format_count(task['num_rows'])} rows",
        columns,
        numbers=columns[1:],
    )
    for metric, found in task["metrics"].items():
        share = metric != "perplexity"
        name = metric + ("" if found["higher_is_better"] else " (lower is better)")
        cells = [format_estimate(found[key], share=share) for key in ("base", "part", "composed")]
        change = found["difference"]
        cells += [format_estimate(change, share=share), p_text(change["p_value"])]
        table.add_row(name, *cells)
    console.stdout().print(table)
