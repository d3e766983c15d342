"""How fast a training step could be on this machine, and where its time goes.

The floor is the arithmetic of the step's matrix products over the rate at which this machine does
the largest of them. What the profile says of each operation is its own time, without what it calls,
summed over the threads: a step of one second on two threads has two.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
_WAITS = {"_Groups", "_GroupsBackward"}  # for the threads that work meanwhile
_THIN = 64  # products with an update's rank among their sizes


def report(profiler: Any, setting: dict[str, Any], step_s: float) -> str:
    """The floor, the share of it, and the operations by their own time.

    Args:
        profiler: after the step.
        setting: of the arm.
        step_s: what the step took under the profiler.
    """
    found = profiler.key_averages(group_by_input_shape=True)
    events = [event for event in found if event.key not in _WAITS]
    total_s = sum(e.self_cpu_time_total for e in events) / 1e6
    flops, seconds, thin_s = 0.0, 0.0, 0.0
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        own_s = event.self_cpu_time_total / 1e6
        by_name[event.key][0] += own_s
        by_name[event.key][1] += event.count
        if event.key in _PRODUCTS:
            sizes = _sizes(event.key, event.input_shapes)
            if min(sizes[-3:]) < _THIN:
                thin_s += own_s
            else:
                flops += 2 * event.count * torch.Size(sizes).numel()
                seconds += own_s
    dtype = torch.bfloat16 if setting["precision"] == "bf16" else torch.float32
    rate = _rate(dtype)
    floor_s = flops / rate
    lines = [
        f"one step of {setting['arm']}, batch {setting['batch_size']}, {setting['precision']}, "
        f"{setting['threads']} threads",
        f"{step_s:8.3f} s  the step under the profiler",
        f"{floor_s:8.3f} s  the floor: {flops / 1e9:.0f} GFLOP of products at the "
        f"{rate / 1e9:.0f} GFLOP/s of (1100 x 576) (576 x 1536)",
        f"{floor_s / step_s:8.1%}    of the step is the floor",
        f"{total_s:8.3f} s  of all threads were in operations, of them",
        f"{seconds:8.3f} s  in those products",
        f"{thin_s:8.3f} s  in the thin products of the updates",
        "",
        f"{'own s':>8} {'share':>7} {'calls':>7}  operation",
    ]
    ordered = sorted(by_name.items(), key=lambda item: -item[1][0])
    lines += [
        f"{own_s:8.3f} {own_s / total_s:7.1%} {count:7.0f}  {name}"
        for name, (own_s, count) in ordered[:30]
    ]
    return "\n".join(lines) + "\n"


def _sizes(name: str, shapes: list[list[int]]) -> list[int]:
    """Batch if any, rows, inner size, columns."""
    first = 1 if "add" in name else 0
    a, b = shapes[first], shapes[first + 1]
    return [*a, b[-1]]


def _rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product as the MLP has it, the best of a few."""
    x, weight = torch.randn(1100, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = min(_seconds(x, weight) for _ in range(30))
    return 2 * 1100 * 576 * 1536 / best


def _seconds(x: Tensor, weight: Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - started
