"""`lorakit plan`: what an adapter would hold, counted on a model without weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lorakit.adapters.plan import AdapterPlan, plan_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.cli import console
from lorakit.errors import RequestError
from lorakit.formatting import format_bytes, format_count, format_number, format_share
from lorakit.layers.kinds import Shape
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import METHODS, build_method
from lorakit.models.empty import empty_model
from lorakit.train.share import trained_share
from lorakit.train.yaml import parse_value

V = TypeVar("V", int, float)

_SEPARATOR = re.compile(r",(?![^(\[{]*[)\]}])")

SUMMARY = "count the parameters and bytes of an adapter, nothing loaded"

_FLOAT32_BYTES = 4
# AdamW keeps two moments beside the parameter and its gradient.
_ADAMW_BYTES = 4 * _FLOAT32_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit plan`."""
    default = LoraSpec()
    parser.add_argument("model", help="a hub id, a directory, a .gguf file or a named model")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
        help="what would be trained (default: %(default)s); the options below are those of lora",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of another method, as in num_layers=1 or blocks=0,1; may be repeated",
    )
    parser.add_argument("--r", type=int, default=default.r, help="the rank (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=default.alpha, help="default: %(default)s")
    parser.add_argument(
        "--targets",
        action="append",
        metavar="A,B,...",
        help="qv, attention, mlp, all-linear, or names, suffixes and parts (default: qv); may "
        "be repeated",
    )
    for name in ("rank", "alpha"):
        parser.add_argument(
            f"--{name}-pattern",
            action="append",
            default=[],
            metavar="NAME=NUMBER",
            help=f"another {name} for a name or regular expression; may be repeated",
        )
    parser.add_argument(
        "--also-train",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that is trained as a whole beside; may be repeated",
    )
    parser.add_argument("--scaling", choices=["alpha/r", "alpha/sqrt(r)"], default=default.scaling)
    parser.add_argument("--init", choices=["gaussian", "kaiming"], default=default.init)
    parser.add_argument("--bias", choices=["none", "lora_only", "all"], default=default.bias)
    parser.add_argument("--sites", action="store_true", help="list every site")


def run(args: argparse.Namespace) -> int:
    """Plan on the meta device and print; returns the exit code."""
    if args.method != LoraMethod.name or args.option:
        return _run_method(args)
    spec = LoraSpec(
        r=args.r,
        alpha=args.alpha,
        targets=_targets(args.targets or ["qv"]),
        scaling=args.scaling,
        rank_pattern=_pattern("--rank-pattern", args.rank_pattern, int),
        alpha_pattern=_pattern("--alpha-pattern", args.alpha_pattern, float),
        init=args.init,
        bias=args.bias,
        also_train=tuple(args.also_train),
    )
    model = empty_model(args.model)
    plan = plan_adapter(model, spec)
    record = _record(args.model, model, plan)
    if args.json:
        console.print_json(record)
    else:
        _show(record, plan, args.sites)
    return 0


def _run_method(args: argparse.Namespace) -> int:
    given = [name for name, value in _lora_flags().items() if vars(args)[name] != value]
    if given and args.method != LoraMethod.name:
        raise RequestError(
            f"options of lora, and the method is {args.method}",
            where="the command line",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            remedy="--option KEY=VALUE sets an option of the method",
        )
    if args.method == LoraMethod.name:
        raise RequestError(
            "lora has flags of its own",
            where="the command line, --option",
            remedy="use --r, --alpha, --targets and the others",
        )
    model = empty_model(args.model)
    method = build_method(args.method, dict(map(_option, args.option)))
    record = _method_record(args.model, model, method)
    if args.json:
        console.print_json(record)
    else:
        _show_method(record, args.sites)
    return 0


def _lora_flags() -> dict[str, Any]:
    # The flags of lora and what they are when they are not given.
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    others = ("model", "method", "option", "sites")
    found = vars(parser.parse_args(["-"]))
    return {name: value for name, value in found.items() if name not in others}


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RequestError(
            "--option needs a key and a value",
            where="the command line",
            expected="KEY=VALUE, as in num_layers=1",
            found=text,
        )
    # a,b is the list that YAML writes [a, b], as in --targets; also_train=a is a list of one.
    parts = [part.strip() for part in _SEPARATOR.split(value)]
    if len(parts) == 1 and (name != "also_train" or value.startswith("[")):
        return name, parse_value(value, where=text)
    return name, [parse_value(part, where=text) for part in parts if part]


def _method_record(ref: str, model: nn.Module, method: Method) -> dict[str, Any]:
    plan = method.plan(model)
    num_base = sum(parameter.numel() for parameter in model.parameters())
    num_added = plan.num_total - num_base
    return {
        "model": ref,
        "class": type(model).__name__,
        "method": method.name,
        "options": method.options(),
        "base_params": num_base,
        "trainable_params": plan.num_trainable,
        "trainable_share": plan.share,
        "adapter_bytes": plan.num_trainable * _FLOAT32_BYTES,
        "base_float32_bytes": num_base * _FLOAT32_BYTES,
        # The learned numbers with gradient and moments; those of the base are not counted twice.
        "training_bytes": (num_base + num_added) * _FLOAT32_BYTES
        + plan.num_trainable * (_ADAMW_BYTES - _FLOAT32_BYTES)
        + plan.kept_bytes,
        "sites": [{"site": site} for site in plan.sites],
        "notes": list(plan.notes),
    }


def _show_method(record: dict[str, Any], every_site: bool) -> None:
    share, sites = format_share(record["trainable_share"]), record["sites"]
    console.print_facts(
        f"{record['model']} ({record['class']})",
        {
            "base": f"{format_count(record['base_params'])} parameters, "
            f"{format_bytes(record['base_float32_bytes'])} in float32",
            "method": f"{record['method']}, {format_count(record['trainable_params'])} parameters "
            f"({share} of all) at {len(sites)} sites, {format_bytes(record['adapter_bytes'])}",
            "training": f"{format_bytes(record['training_bytes'])} for float32 weights, "
            "gradients and AdamW, without activations",
        },
    )
    for site in sites if every_site else ():
        console.print_text(site["site"])
    for note in record["notes"]:
        console.note(note)


def _targets(given: list[str]) -> str | tuple[str, ...]:
    # A comma inside brackets belongs to a regular expression, as in layers\.\d{1,2}.
    split = [name.strip() for text in given for name in _SEPARATOR.split(text)]
    names = tuple(name for name in split if name)
    return names[0] if len(names) == 1 else names


def _pattern(option: str, given: list[str], number: Callable[[str], V]) -> dict[str, V]:
    pattern: dict[str, V] = {}
    for text in given:
        # From the right: an expression may hold "=", a number cannot.
        name, _, value = text.rpartition("=")
        try:
            pattern[name] = number(value)
        except ValueError:
            name = ""
        if not name:
            raise RequestError(
                f"{option} needs a name and a number",
                where="the command line",
                expected="NAME=NUMBER, as in down_proj=4",
                found=text,
            )
    return pattern


def _record(ref: str, model: nn.Module, plan: AdapterPlan) -> dict[str, Any]:
    num_base = sum(parameter.numel() for parameter in model.parameters())
    num_trained = plan.num_params()
    return {
        "model": ref,
        "class": type(model).__name__,
        "spec": plan.spec.to_dict(),
        "base_params": num_base,
        "trainable_params": num_trained,
        "trainable_share": trained_share(num_trained, num_base),
        "adapter_bytes": num_trained * _FLOAT32_BYTES,
        "base_float32_bytes": num_base * _FLOAT32_BYTES,
        "training_bytes": num_base * _FLOAT32_BYTES + num_trained * _ADAMW_BYTES,
        "sites": [
            {
                "site": site.name,
                "shape": list(site.shape),
                "r": site.r,
                "scaling": site.scaling,
                "num_params": site.num_params(),
            }
            for site in plan.sites
        ],
        "trained_beside": [site.module for site in plan.overrides],
        "notes": list(plan.notes),
    }


def _show(record: dict[str, Any], plan: AdapterPlan, every_site: bool) -> None:
    share = format_share(record["trainable_share"])
    console.print_facts(
        f"{record['model']} ({record['class']})",
        {
            "base": f"{format_count(record['base_params'])} parameters, "
            f"{format_bytes(record['base_float32_bytes'])} in float32",
            "adapter": f"{format_count(record['trainable_params'])} parameters ({share} of all), "
            f"{format_bytes(record['adapter_bytes'])}",
            "training": f"{format_bytes(record['training_bytes'])} for float32 weights, "
            "gradients and AdamW, without activations",
        },
    )
    columns = ["sites", "of", "out x in", "r", "scaling", "parameters"]
    table = console.table(f"{len(plan.sites)} sites", columns, numbers=columns[1:])
    groups: dict[tuple[str, Shape, int, float], list[int]] = {}
    for site in plan.sites:
        name = site.name if every_site else _last_names(site.name)
        key = (name, site.shape, site.r, site.scaling)
        groups.setdefault(key, []).append(site.num_params())
    for (name, shape, r, scaling), params in groups.items():
        size = " x ".join(map(str, shape))
        counts = (str(len(params)), size, str(r), format_number(float(scaling)))
        table.add_row(name, *counts, format_count(sum(params)))
    for beside in plan.overrides:
        table.add_row(
            f"{beside.module}, trained whole", "1", "", "", "", format_count(beside.num_params())
        )
    console.stdout().print(table)


def _last_names(name: str) -> str:
    """What repeats in every layer: `self_attn.q_proj` of `layers.3.self_attn.q_proj`."""
    parts = name.split(".")
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_number + 1 :])
