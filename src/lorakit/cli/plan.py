"""`lorakit plan`: what a run would take, counted on a model without weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from lorakit.adapters.spec import LoraSpec
from lorakit.cli import console
from lorakit.cli.plan_show import plan_record, show_plan
from lorakit.environment import available_memory_bytes
from lorakit.errors import RequestError
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import METHODS
from lorakit.planner.plan import RunRequest, plan_run
from lorakit.train.yaml import parse_value

V = TypeVar("V", int, float)

_SEPARATOR = re.compile(r",(?![^(\[{]*[)\]}])")

SUMMARY = "count parameters, memory and time of a run, nothing loaded"

_NAMED = ("r", "budget", "alpha", "scaling", "init", "bias")
# The flags that are options of lora; another method takes --option.
_OF_LORA = (
    "r",
    "budget",
    "alpha",
    "targets",
    "rank_pattern",
    "alpha_pattern",
    "also_train",
    "scaling",
    "init",
    "bias",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lorakit plan`."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a shape by name (llama-3-8b, gpt3-175b; see docs/plan.md), a hub id, a directory, a "
        ".gguf file or a named model",
    )
    parser.add_argument("--model", dest="model_flag", metavar="REF", help="the same, as a flag")
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
    _add_lora(parser)
    _add_run(parser)
    parser.add_argument("--sites", action="store_true", help="list every site")


def _add_lora(parser: argparse.ArgumentParser) -> None:
    default = LoraSpec()
    parser.add_argument(
        "--r",
        "--rank",
        type=_rank,
        default=default.r,
        metavar="N",
        help="the rank, or auto: what --budget pays for (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", metavar="SIZE", help="of r auto: parameters (400k) or bytes ('1.5 MB')"
    )
    parser.add_argument(
        "--alpha", type=float, default=default.alpha, metavar="X", help="the scaling is alpha/r"
    )
    parser.add_argument(
        "--targets",
        action="append",
        metavar="A,B,...",
        help="qv, attention, mlp, all-linear, or names, suffixes and parts (default: qv); may "
        "be repeated",
    )
    _add_patterns(parser)
    parser.add_argument(
        "--scaling",
        choices=["alpha/r", "alpha/sqrt(r)"],
        default=default.scaling,
        help="alpha/sqrt(r) is rsLoRA",
    )
    parser.add_argument(
        "--init",
        choices=["gaussian", "kaiming"],
        default=default.init,
        help="where A starts; B starts at 0",
    )
    parser.add_argument(
        "--bias",
        choices=["none", "lora_only", "all"],
        default=default.bias,
        help="biases trained beside: none, those of the targets, or all",
    )


def _add_patterns(parser: argparse.ArgumentParser) -> None:
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


def _add_run(parser: argparse.ArgumentParser) -> None:
    default = RunRequest(model="-")
    number, integer = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
    for name, kind, text in (
        ("--batch-size", integer, f"rows in one forward pass (default: {default.batch_size})"),
        ("--length", integer, f"tokens in a row (default: {default.length})"),
        ("--labels", integer, "learned tokens in a batch (default: all)"),
        ("--classes", integer, "plan a classifier with so many classes"),
        ("--num-examples", integer, "rows in an epoch, for its time"),
        ("--flops", number, "operations per second that are reached, as in 2e14, for the time"),
        ("--processes", integer, "processes that train together, each with such a batch"),
        ("--bandwidth-gbps", number, "10^9 bits per second that each of them sends and receives"),
        ("--memory", number, "GB that may be taken (default: what is free here, or a GPU kind)"),
    ):
        parser.add_argument(name, help=text, **kind)  # pyright: ignore[reportArgumentType]
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the base")
    parser.add_argument("--quantize", choices=["nf4"], help="keep linear layers in 4 bits")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="arithmetic of the forward pass; auto: bf16 where the device has it",
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations"
    )
    parser.add_argument("--shard", action="store_true", help="the processes split the base (FSDP2)")
    parser.add_argument("--attention", metavar="NAME", help="the attention kernel")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where it would run (default: this machine's)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="take a micro-step here, with random weights of this shape, for the time",
    )
    parser.add_argument(
        "--advice", action="store_true", help="say what to change also where it fits"
    )


def run(args: argparse.Namespace) -> int:
    """Plan on the meta device and print; returns the exit code."""
    plan = plan_run(_request(args))
    if args.calibrate:
        plan = plan.calibrated()
    limit_bytes = None if args.memory is None else round(args.memory * 1e9)
    if limit_bytes is None and plan.setup.device == "cpu":
        limit_bytes = available_memory_bytes()
    total_bytes = plan.memory.total_bytes
    too_large = limit_bytes is not None and total_bytes > limit_bytes
    if limit_bytes is None:
        too_large = not any(fit.fits for fit in plan.gpus)
    record = plan_record(plan, limit_bytes=limit_bytes, advise=args.advice or too_large)
    if args.json:
        console.print_json(record)
    else:
        show_plan(record, every_site=args.sites)
    return 0


def _request(args: argparse.Namespace) -> RunRequest:
    model = args.model_flag or args.model
    if model is None or (args.model_flag and args.model):
        raise RequestError(
            "one model is planned for",
            where="the command line",
            expected="lorakit plan MODEL, or --model MODEL",
            found="none" if model is None else f"{args.model} and {args.model_flag}",
        )
    given = {
        "batch_size": args.batch_size,
        "length": args.length,
        "labels": args.labels,
        "classes": args.classes,
        "num_examples": args.num_examples,
        "flops_per_s": args.flops,
        "processes": args.processes,
        "bandwidth_gbps": args.bandwidth_gbps,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "attention": args.attention,
        "device": args.device,
    }
    return RunRequest(
        model=model,
        method=args.method,
        options=_options(args),
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        shard=args.shard,
        **{name: value for name, value in given.items() if value is not None},
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    _add_lora(parser)
    default = vars(parser.parse_args([]))
    given = [name for name in _OF_LORA if vars(args)[name] != default[name]]
    if args.method == LoraMethod.name:
        if args.option:
            raise RequestError(
                "lora has flags of its own",
                where="the command line, --option",
                remedy="use --r, --alpha, --targets and the others",
            )
        return {
            **{name: vars(args)[name] for name in _NAMED},
            "targets": _targets(args.targets or ["qv"]),
            "rank_pattern": _pattern("--rank-pattern", args.rank_pattern, int),
            "alpha_pattern": _pattern("--alpha-pattern", args.alpha_pattern, float),
            "also_train": tuple(args.also_train),
        }
    if given:
        raise RequestError(
            f"options of lora, and the method is {args.method}",
            where="the command line",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            remedy="--option KEY=VALUE sets an option of the method",
        )
    return dict(map(_option, args.option))


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


def _rank(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


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
