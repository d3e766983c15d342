"""From finished arms to sweep.json: one entry per arm, plain values only."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lorakit.environment import command_line, hardware, peak_memory_bytes, versions
from lorakit.sweep.arms import Arm
from lorakit.sweep.plan import SweepPlan
from lorakit.train.merit import Merit, merit, merit_name
from lorakit.train.metrics import Line

_WORST = (-math.inf, -math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An arm that is not trained any further.

    Attributes:
        record: its run.json; None where it failed.
        dropped_at: the rung where halving stopped it, or None.
        failed: why it failed, or None.
        lines: its metrics.
    """

    record: dict[str, Any] | None
    dropped_at: int | None
    failed: str | None
    lines: list[Line]


def document(
    plan: SweepPlan, ended: Mapping[str, Ended], *, seconds: float, engine: str
) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        plan: the sweep.
        ended: its arms by name.
        seconds: wall time of this call.
        engine: where its arms were trained.
    """
    arms = [_arm(plan, arm, ended[arm.name]) for arm in _in_order(plan, ended)]
    return {
        "kind": "sweep",
        "title": plan.config.output.name,
        "command": command_line(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "best": _best(plan, ended),
        "together": plan.together,
        "engine": engine,
        "rungs": list(plan.rungs),
        "arms": arms,
        "config": plan.config.to_dict(),
        "memory": {"estimate": plan.memory.to_json(), "peak_bytes": peak_memory_bytes()},
        "seconds": {"this_call": seconds, "all_arms": sum(arm["busy_s"] for arm in arms)},
        "versions": versions(),
        "hardware": hardware(),
    }


def _arm(plan: SweepPlan, arm: Arm, ended: Ended) -> dict[str, Any]:
    lines = ended.lines
    trained = [line for line in lines if "loss" in line]
    final = {} if ended.record is None else ended.record["metrics"]["final"]
    steps = trained[-1]["step"] if trained else 0
    by = plan.best_by(arm)
    return {
        "name": arm.name,
        "settings": dict(arm.settings),
        "eval_loss": final.get("eval_loss"),
        "by": merit_name(by),
        "value": final.get(f"eval_{by}"),
        "best_step": final.get("step"),
        "steps": steps,
        "dropped_at": ended.dropped_at,
        "failed": ended.failed,
        "trainable_params": plan.prepared[arm.name].plan.num_trainable,
        "adapter": None if ended.record is None else f"arms/{arm.name}/adapter",
        "busy_s": sum(line["step_s"] for line in trained),
        "eval_curve": [[n["step"], n["eval_loss"]] for n in lines if "eval_loss" in n],
        "train_curve": [[n["step"], n["loss"]] for n in trained],
    }


def _in_order(plan: SweepPlan, ended: Mapping[str, Ended]) -> list[Arm]:
    """Those that came furthest first, then the better ones; failed ones last."""

    def rank(arm: Arm) -> tuple[bool, int, Merit]:
        end = ended[arm.name]
        lasted = end.dropped_at or sys.maxsize
        return end.failed is None, lasted, _merit(plan, arm, end) or _WORST

    return sorted(plan.arms, key=rank, reverse=True)


def _merit(plan: SweepPlan, arm: Arm, end: Ended) -> Merit | None:
    if end.record is None:
        return None
    return merit(end.record["metrics"]["final"], plan.best_by(arm))


def _best(plan: SweepPlan, ended: Mapping[str, Ended]) -> str | None:
    """The best of those that halving kept; None where arms do not compare."""
    first = _in_order(plan, ended)[0]
    judged = _merit(plan, first, ended[first.name]) is not None
    return first.name if plan.comparable and judged else None
