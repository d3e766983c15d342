"""The paper's Table 1: what an adapter costs in one forward pass.

GPT-2 medium's shape with random weights. For each cell of the paper's grid (batch x sequence x
learned parameters) one process holds the base, LoRA merged and unmerged (q and v), Adapter-L and
Adapter-H, each with the size r that comes nearest to the cell's parameters. Every round times one
forward pass of each, in an order of its own, so that whatever disturbs the machine disturbs all of
them; a round's ratio is a pass over the same round's base. The base is timed twice: the ratio of
the second to the first is the noise. A pass runs without gradient and cache and computes the
logits of the last position only, as a prompt is read.

    python benchmarks/latency.py --scale 8 --output benchmarks/results/latency.json

`--scale` divides the paper's batch sizes and its 100 trials; `--model small` takes a smaller shape.
"""

from __future__ import annotations

import argparse
import copy
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit.environment import hardware, versions
from lorakit.files import write_json
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method

SHAPES = {
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "small": {"n_embd": 256, "n_layer": 6, "n_head": 4},
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
# Batch, sequence, learned parameters; what the paper measured, in ms on a Quadro RTX 8000, and
# what Adapter-L and Adapter-H added, in percent.
CELLS = (
    (32, 512, 0.5e6, {"full": 1449.4, "lin": 2.2, "houlsby": 3.0}),
    (16, 256, 11e6, {"full": 338.0, "lin": 5.0, "houlsby": 8.4}),
    (1, 128, 11e6, {"full": 19.8, "lin": 20.7, "houlsby": 30.3}),
)
PAPER_TRIALS = 100
WARMUP_ROUNDS = 2
BASE, AGAIN = "full", "full again"
TITLES = {
    BASE: "full fine-tuning",
    AGAIN: "the same again (noise)",
    "lora merged": "LoRA merged",
    "lora unmerged": "LoRA unmerged",
    "lin": "Adapter-L",
    "houlsby": "Adapter-H",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One model to time."""

    model: GPT2LMHeadModel
    r: int
    num_params: int


def main() -> None:
    """Time every cell, print the table, write the result."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    trials = args.trials or max(2, round(PAPER_TRIALS / args.scale))
    _say_what(args, trials)
    base = _base(args, device)
    cells = [_cell(base, cell, args=args, trials=trials) for cell in CELLS]
    result = {
        "benchmark": "latency",
        "command": shlex.join(["python", *sys.argv]),
        "model": {"name": args.model, "num_params": _count(base), **SHAPES[args.model]},
        "dtype": args.dtype,
        "device": args.device,
        "scale": args.scale,
        "trials": trials,
        "seed": args.seed,
        "hardware": hardware(),
        "versions": versions(),
        "cells": cells,
    }
    write_json(args.output, result)
    print(f"written to {args.output}")


def _cell(
    base: GPT2LMHeadModel,
    cell: tuple[int, int, float, dict[str, float]],
    *,
    args: argparse.Namespace,
    trials: int,
) -> dict[str, Any]:
    paper_batch, length, budget, paper = cell
    batch = max(1, round(paper_batch / args.scale))
    share = _count(base) / _count(_empty("gpt2-medium"))
    # A smaller shape gets the same share of its own parameters.
    variants = _variants(base, budget * share)
    torch.manual_seed(args.seed)
    vocabulary = base.config.vocab_size
    ids = torch.randint(vocabulary, (batch, length), device=args.device)
    difference = _require_agreement(variants, ids[:1])
    seconds = _time(variants, ids, trials=trials, seed=args.seed)
    summary = {name: _summary(name, seconds, args.seed) for name in seconds}
    _print_cell((batch, length, budget * share), variants, summary)
    return {
        "batch": batch,
        "length": length,
        "budget": round(budget * share),
        "paper": {
            "batch": paper_batch,
            "full_ms": paper["full"],
            "lin_percent": paper["lin"],
            "houlsby_percent": paper["houlsby"],
        },
        "merged_logit_difference": difference,
        "variants": {
            name: {"r": variants[name].r, "num_params": variants[name].num_params, **summary[name]}
            for name in summary
        },
    }


def _variants(base: GPT2LMHeadModel, budget: float) -> dict[str, Variant]:
    """All models of a cell; but for the merged one they share the base's tensors."""
    found = {BASE: Variant(base, 0, 0), AGAIN: Variant(base, 0, 0)}
    for name, method_name in (
        ("lora unmerged", "lora"),
        ("lora merged", "lora"),
        ("lin", "lin"),
        ("houlsby", "houlsby"),
    ):
        r = _size_for(base, method_name, budget)
        merged = name == "lora merged"
        model = copy.deepcopy(base) if merged else _sharing(base)
        method = _method(method_name, r)
        # The same seed for both LoRAs: they are one adapter, and must agree.
        torch.manual_seed(1)
        num_params = method.attach(model).num_trainable
        _pretend_learned(method.state(model))
        if merged:
            method.merge(model)
        found[name] = Variant(model.eval(), r, num_params)
    return found


def _method(name: str, r: int) -> Method:
    if name == "lora":
        return build_method("lora", {"r": r, "alpha": 2 * r, "targets": "qv"})
    return build_method(name, {"bottleneck": r})


def _size_for(base: GPT2LMHeadModel, name: str, budget: float) -> int:
    """The r whose count is nearest; every method's count is linear in r."""
    one, two = (_method(name, r).plan(base).num_trainable for r in (1, 2))
    return max(1, round(1 + (budget - one) / (two - one)))


def _sharing(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A second tree of modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _pretend_learned(state: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(state):
            noise = torch.randn(state[name].shape, generator=generator)
            state[name].add_(0.02 * noise.to(state[name].device))


def _forward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def _require_agreement(variants: dict[str, Variant], ids: Tensor) -> float:
    """Merged and unmerged LoRA are one function, and another one than the base; else say so."""
    base, merged, live = (
        _forward(variants[n].model, ids).float() for n in (BASE, "lora merged", "lora unmerged")
    )
    difference = (merged - live).abs().max().item()
    change = (live - base).abs().max().item()
    if not difference < 0.1 * change:
        raise SystemExit(
            f"merged and unmerged LoRA differ by {difference:.3g}, where LoRA changes {change:.3g}"
        )
    return difference


def _time(
    variants: dict[str, Variant], ids: Tensor, *, trials: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of one pass, by variant and round; all variants in every round, shuffled."""
    synchronise: Callable[[], None] = (
        torch.cuda.synchronize if ids.device.type == "cuda" else lambda: None
    )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(seed)
    for trial in range(WARMUP_ROUNDS + trials):
        for name in order.sample(list(variants), len(variants)):
            synchronise()
            started = time.perf_counter()
            _forward(variants[name].model, ids)
            synchronise()
            if trial >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _summary(name: str, seconds: dict[str, list[float]], seed: int) -> dict[str, Any]:
    """The median time, and the median ratio to the same round's base with its spread."""
    ratios = [mine / base for mine, base in zip(seconds[name], seconds[BASE], strict=True)]
    draws = random.Random(seed)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median_ms": round(1e3 * statistics.median(seconds[name]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_95": [round(medians[49], 4), round(medians[1949], 4)],
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


def _say_what(args: argparse.Namespace, trials: int) -> None:
    machine, found = hardware(), versions()
    place = machine["gpus"][0]["name"] if args.device == "cuda" else machine["cpu"]
    print(f"{args.model} {SHAPES[args.model]}, random weights, {args.dtype}, on {place}")
    print(f"{torch.get_num_threads()} threads, {trials} rounds after {WARMUP_ROUNDS} to warm up")
    print(", ".join(f"{name} {found[name]}" for name in ("lorakit", "torch", "transformers")))


def _print_cell(
    cell: tuple[int, int, float], variants: dict[str, Variant], summary: dict[str, dict[str, Any]]
) -> None:
    batch, length, budget = cell
    print(f"\nbatch {batch}, {length} tokens, about {budget / 1e6:.3g}M learned parameters")
    print(f"{'':<24}{'r':>5}{'learned':>12}{'ms':>10}{'ratio':>8}   95 % interval")
    for name, row in summary.items():
        low, high = row["ratio_95"]
        print(
            f"{TITLES[name]:<24}{variants[name].r or '':>5}{variants[name].num_params:>12,}"
            f"{row['median_ms']:>10.2f}{row['ratio']:>8.3f}   {low:.3f} to {high:.3f}"
        )


def _base(args: argparse.Namespace, device: torch.device) -> GPT2LMHeadModel:
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(**SHAPES[args.model]))
    return model.to(device=device, dtype=getattr(torch, args.dtype)).eval()


def _empty(shape: str) -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(**SHAPES[shape]))


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the paper's Table 1, re-measured")
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-medium")
    parser.add_argument("--scale", type=float, default=1.0, help="divides batches and rounds")
    parser.add_argument("--trials", type=int, help="rounds; default: 100 over the scale")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/latency.json"), help="JSON file"
    )
    args = parser.parse_args()
    if args.scale < 1 or (args.trials is not None and args.trials < 2):
        parser.error("--scale is at least 1, and --trials at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine or this torch has no CUDA device")
    return args


if __name__ == "__main__":
    main()
