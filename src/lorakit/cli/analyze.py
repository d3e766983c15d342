"""`lorakit analyze`: what an adapter has learned, and what two have in common."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import takewhile

from lorakit.analysis.options import MEASURES, AnalyzeOptions
from lorakit.analysis.pairs import OFS
from lorakit.analysis.run import Analysis, SiteFacts, analyze
from lorakit.analysis.training import adapter_of
from lorakit.analysis.updates import Base
from lorakit.analysis.write import PAGE_NAME, write_analysis
from lorakit.cli import console
from lorakit.cli.numbers import count
from lorakit.cli.session import base_of, task_of
from lorakit.errors import RequestError
from lorakit.files import require_free
from lorakit.formatting import format_number, format_share
from lorakit.methods.files import read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.models.load import load_base_model

SUMMARY = "see what an adapter has learned, and what two have in common"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit analyze`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="an adapter's directory (lorakit's, or any tool's in PEFT's layout) or a run of "
        "lorakit train; two are compared",
    )
    parser.add_argument(
        "--model",
        "--base",
        metavar="REF",
        help="the base: a hub id, a directory, a .gguf file or a named model; by default the one "
        "that the first adapter names",
    )
    parser.add_argument(
        "--without-base",
        action="store_true",
        help="do not load the base: no amplification, no intruders, no relative norms",
    )
    parser.add_argument(
        "--any-base", action="store_true", help="even if it was trained on another base"
    )
    parser.add_argument("--device", metavar="DEVICE", help="where the base is: cpu, cuda, ...")
    _add_choices(parser)
    parser.add_argument("--top", type=count, default=12, metavar="N", help="sites shown")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help=f"also write JSON, CSV and {PAGE_NAME} there; must not exist yet, or be empty",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measures",
        metavar="A,B,...",
        help=f"what to measure: {', '.join(MEASURES)} (default: all that is possible)",
    )
    parser.add_argument(
        "--sites",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only sites of this name, suffix or regular expression; may be repeated",
    )
    parser.add_argument(
        "--of",
        choices=list(OFS),
        default="A",
        help="whose directions the subspaces compare: A (the paper's, default), B, or the inputs "
        "or outputs of the weight's change",
    )
    parser.add_argument(
        "--directions",
        type=int,
        metavar="N",
        help="directions the amplification takes (default: each site's rank)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random controls")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; returns the exit code."""
    names = None if args.measures is None else args.measures.split(",")
    options = AnalyzeOptions(
        measures=None if names is None else tuple(n.strip() for n in names if n.strip()),
        of=args.of,
        sites=tuple(args.sites),
        directions=args.directions,
        any_base=args.any_base,
        seed=args.seed,
    )
    if args.without_base and args.model:
        raise RequestError(
            "a base is named, and it is not to be loaded",
            where="the command line",
            remedy="leave out --model or --without-base",
        )
    if args.output:
        require_free(args.output)
    for path in args.adapters:
        _require_lora(str(adapter_of(path)))
    base = None if args.without_base else partial(_load_base, args)
    analysis = analyze(args.adapters, options, base=base)
    files: list[str] = []
    if args.output:
        files = write_analysis(analysis, args.output, command=_command(args))
    if args.json:
        console.print_json({**analysis.to_json(), "output": args.output, "files": files})
        return 0
    _show(analysis, args.top)
    if args.output:
        console.print_text(f"{args.output}: {', '.join(files)}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """What makes the page again."""
    words = ["lorakit", "analyze", *args.adapters]
    for name in ("model", "measures", "of", "directions", "seed", "device"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for pattern in args.sites:
        words += ["--sites", pattern]
    words += [f"--{n.replace('_', '-')}" for n in ("without_base", "any_base") if getattr(args, n)]
    return shlex.join(words)


def _require_lora(path: str) -> None:
    saved = read_saved(path)
    if saved.name != LoraMethod.name:
        raise RequestError(
            f"what {saved.name} learned is not a low-rank update",
            where=path,
            expected="an adapter in PEFT's layout",
            remedy="lorakit inspect shows what a method learned",
        )


def _load_base(args: argparse.Namespace) -> Base:
    first = str(adapter_of(args.adapters[0]))
    ref = args.model or base_of(first)
    console.note(f"loading {ref}")
    task = task_of(first, args.model)
    model = load_base_model(
        ref, device=args.device, dtype="float32", head=None if task is None else task.head
    )
    return Base(model)


def _show(analysis: Analysis, top: int) -> None:
    for label in analysis.adapters:
        _show_sites(label, [s for s in analysis.sites if s.adapter == label], top)
    if analysis.subspaces or analysis.agreement:
        _show_pair(analysis, top)
    for note in analysis.notes:
        console.note(note)


def _show_sites(label: str, sites: Sequence[SiteFacts], top: int) -> None:
    shown = sites[:top]
    columns = [name for name in _SITE_COLUMNS if any(_site_cell(name, site) for site in shown)]
    prefix = _prefix([site.site for site in shown])
    title = f"{label}: {prefix}" if prefix else label
    table = console.table(title, ["site", *columns], numbers=columns)
    for site in shown:
        name = site.site.removeprefix(prefix)
        table.add_row(name, *(_site_cell(column, site) for column in columns))
    console.stdout().print(table)
    if len(sites) > top:
        console.note(f"{top} of {len(sites)} sites; all: --json, or -o DIR")


_SITE_COLUMNS = (
    "r", "norm", "of W0", "eff. rank", "along dW", "along W0", "random", "factor", "intruders",
)  # fmt: skip


def _site_cell(column: str, site: SiteFacts) -> str:
    """One number of a site as text; empty where it was not measured."""
    found, new = site.amplification, site.intruders
    if column == "r":
        return str(site.spectrum.r)
    if column == "eff. rank":
        return f"{site.spectrum.effective_rank:.2f}"
    if column == "of W0":
        return "" if site.relative_norm is None else format_share(site.relative_norm)
    if column == "intruders":
        return "" if new is None else str(len(new.positions))
    numbers = {
        "norm": site.spectrum.norm,
        "along dW": None if found is None else found.of_update,
        "along W0": None if found is None else found.of_base,
        "random": None if found is None else found.of_random,
        "factor": None if found is None else found.factor,
    }
    value = numbers[column]
    return "" if value is None else format_number(value)


def _prefix(sites: Sequence[str]) -> str:
    """What all names begin with, whole components only: it is written once, in the title."""
    if len(sites) < 2:
        return ""
    names = (site.split(".") for site in sites)
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return "".join(f"{parts[0]}." for parts in same)


def _show_pair(analysis: Analysis, top: int) -> None:
    subspaces = {found.site: found for found in analysis.subspaces}
    agreements = {found.site: found for found in analysis.agreement}
    sites = list(dict.fromkeys([*subspaces, *agreements]))
    prefix = _prefix(sites[:top])
    columns = ["phi(1, 1)", "phi(r1, r2)", "chance"] if subspaces else []
    columns += ["cosine", "sign conflict"] if agreements else []
    title = " and ".join(analysis.adapters) + (f": {prefix}" if prefix else "")
    table = console.table(title, ["site", *columns], numbers=columns)
    for site in sites[:top]:
        cells: list[str] = []
        if subspaces:
            phi = subspaces.get(site)
            numbers = (None,) * 3 if phi is None else (phi.first, phi.whole, phi.chance)
            cells += ["" if value is None else format_number(value) for value in numbers]
        if agreements:
            both = agreements[site]
            cells += [format_number(both.cosine), format_share(both.sign_conflict)]
        table.add_row(site.removeprefix(prefix), *cells)
    console.stdout().print(table)
    if len(sites) > top:
        console.note(f"{top} of {len(sites)} common sites; all: --json, or -o DIR")
