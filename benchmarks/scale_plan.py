"""LoRA on 8B, 70B and 175B in several processes: the memory planned, the step calculated.

Nothing is loaded or measured. Memory is counted by the planner; the time of a step is calculated
from operations at a stated rate and bytes at a stated bandwidth.

    python benchmarks/scale_plan.py --output benchmarks/results/scale_plan.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorakit.environment import command_line, versions
from lorakit.files import write_json
from lorakit.planner.plan import RunPlan, RunRequest, plan_run

LENGTH = 2048
# What a GPU is taken to reach, and what each is taken to send and receive.
FLOPS_PER_S = 2e14
BANDWIDTHS_GBPS = (100.0, 400.0)
# model, processes, split over them, 4 bits, recomputed activations
RECIPES = (
    ("llama-3-8b", 8, False, False, True),
    ("llama-3-8b", 8, True, False, True),
    ("llama-3-70b", 8, False, True, True),
    ("llama-3-70b", 2, True, True, True),
    ("llama-3-70b", 8, True, True, True),
    ("llama-3-70b", 8, True, False, True),
    ("llama-3-70b", 16, True, False, True),
    ("gpt3-175b", 8, True, False, True),
    ("gpt3-175b", 16, True, False, True),
    ("gpt3-175b", 32, True, False, True),
)


def main() -> None:
    """Plan every recipe, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="where the result goes")
    args = parser.parse_args()
    rows = [_row(recipe) for recipe in RECIPES]
    for row in rows:
        steps = " | ".join(
            f"{network['fastest_step_s']:.1f} to {network['slowest_step_s']:.1f} s"
            for network in row["network"]
        )
        print(
            f"| {row['model']} | {row['how']} | {row['processes']} | "
            f"{row['base_bytes'] / 1e9:.0f} GB | {row['total_bytes'] / 1e9:.0f} GB | "
            f"{row['smallest_gpu'] or 'none'} | {row['compute_s']:.1f} s | {steps} |"
        )
    record: dict[str, Any] = {
        "title": "LoRA r=16 on all linear layers in several processes, planned",
        "kind": "scale_plan",
        "command": command_line(),
        "stated": {"flops_per_s": FLOPS_PER_S, "bandwidths_gbps": list(BANDWIDTHS_GBPS)},
        "rows_per_process": 1,
        "length": LENGTH,
        "rows": rows,
        "versions": versions(),
    }
    if args.output is not None:
        write_json(args.output, record)


def _row(recipe: tuple[str, int, bool, bool, bool]) -> dict[str, Any]:
    model, processes, shard, four_bit, recomputed = recipe
    plan = plan_run(_request(recipe, BANDWIDTHS_GBPS[0]))
    faster = [plan_run(_request(recipe, b)) for b in BANDWIDTHS_GBPS[1:]]
    memory = plan.memory
    return {
        "model": model,
        "how": ("split (FSDP2)" if shard else "whole") + (" in NF4" if four_bit else ""),
        "processes": processes,
        "recomputed": recomputed,
        "trained_params": plan.report.num_trainable,
        "base_bytes": memory.weights_bytes,
        "total_bytes": memory.total_bytes,
        "memory": memory.to_json(),
        "smallest_gpu": next((fit.gpu.name for fit in plan.gpus if fit.fits), None),
        "compute_s": plan.step_s,
        "network": [_network(p) for p in (plan, *faster)],
    }


def _network(plan: RunPlan) -> dict[str, Any]:
    found = plan.network
    assert found is not None
    return {"bandwidth_gbps": plan.request.bandwidth_gbps, **found.to_json()}


def _request(recipe: tuple[str, int, bool, bool, bool], bandwidth_gbps: float) -> RunRequest:
    model, processes, shard, four_bit, recomputed = recipe
    return RunRequest(
        model=model,
        options={"r": 16, "targets": "all-linear"},
        batch_size=1,
        length=LENGTH,
        quantize="nf4" if four_bit else None,
        gradient_checkpointing=recomputed,
        device="cuda",
        flops_per_s=FLOPS_PER_S,
        processes=processes,
        shard=shard,
        bandwidth_gbps=bandwidth_gbps,
    )


if __name__ == "__main__":
    main()
