"""Speed and memory of DPO beside TRL's: one process for each arm, their steps in turn.

Every arm trains the same pairs of the same tokens in its own trainer; a round is one optimizer step
of each arm. Before that every arm must find the same losses on the same batches: log 2 at the
start, and others once all have the same factors. `preference.py` calls it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import random
from pathlib import Path
from typing import Any

import preference_arms
from train_speed import speed_ratio
from train_worker import Worker

BESIDE = "trl-two-models"
_TOLERANCE = 1e-4


def measure_speed(args: argparse.Namespace, rows: Path) -> dict[str, Any]:
    """Tokens/s and peak memory of each arm, and the ratios to TRL with a separate reference.

    Args:
        args: model, batch_size, rounds, threads, verbose.
        rows: a file of pairs for one epoch of all rounds.
    """
    workers = {name: Worker(_setting(args, name, rows)) for name in preference_arms.ARMS}
    try:
        started = {name: worker.read() for name, worker in workers.items()}
        _require_equal_losses({name: fact["losses"] for name, fact in started.items()})
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        order = random.Random(0)
        for number in range(args.rounds):
            for name in order.sample(list(workers), len(workers)):
                steps[name].append(workers[name].step())
            shown = ", ".join(f"{n} {s[-1]['seconds']:.2f} s" for n, s in steps.items())
            print(f"round {number + 1} of {args.rounds}: {shown}", flush=True)
        peaks = {name: worker.finish()["peak_bytes"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    arms = {
        name: {
            "what": what,
            "tokens_per_s": _per_second(steps[name]),
            "step_s": [round(step["seconds"], 3) for step in steps[name]],
            "peak_bytes": peaks[name],
            "losses": started[name]["losses"],
            "speed_over_trl_two_models": speed_ratio(steps[name], steps[BESIDE], 0),
            "memory_over_trl_two_models": round(peaks[name] / peaks[BESIDE], 3),
        }
        for name, what in preference_arms.ARMS.items()
    }
    return {
        "setting": {
            "model": args.model,
            "adapter": "LoRA r=8, alpha=16, all linear layers, no dropout",
            "pairs_per_step": args.batch_size,
            "rounds": args.rounds,
            "precision": "fp32",
            "threads": args.threads,
            "memory": "the largest resident size of the process during the steps, libraries too",
        },
        "arms": arms,
        "versions": {name: importlib.metadata.version(name) for name in ("peft", "trl")},
    }


def print_speed(found: dict[str, Any]) -> None:
    """A line for each arm."""
    for name, arm in found["arms"].items():
        ratio = arm["speed_over_trl_two_models"]
        print(
            f"{name:<20} {arm['tokens_per_s']:>8.1f} tokens/s, {ratio['value']:.2f} x "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}); {arm['peak_bytes'] / 2**20:.0f} MiB, "
            f"{arm['memory_over_trl_two_models']:.2f} x"
        )


def _setting(args: argparse.Namespace, name: str, rows: Path) -> dict[str, Any]:
    return {
        "module": "preference_arms",
        "arm": name,
        "rows": str(rows),
        "batch_size": args.batch_size,
        "threads": args.threads,
        "precision": "fp32",
        "seed": 0,
        "model": args.model,
        "verbose": args.verbose,
        "huge_pages": name == "lorakit",
        "checks": True,
        "checks_start": True,
    }


def _require_equal_losses(losses: dict[str, list[float]]) -> None:
    first = losses[BESIDE]
    half = len(first) // 2
    for name, found in losses.items():
        worst = max(abs(a - b) for a, b in zip(found, first, strict=True))
        start = max(abs(loss - math.log(2)) for loss in found[:half])
        print(f"losses of {name}: {found} (differ by at most {worst:.1e})", flush=True)
        if max(worst, start) > _TOLERANCE:
            raise SystemExit(f"{name} computes another loss: {max(worst, start):.3g} away")


def _per_second(steps: list[dict[str, float]]) -> float:
    return round(sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps), 1)
