"""The paper's arithmetic of GPT-3 175B beside what the planner says of the same setting.

Section 4.2 of Hu et al. 2021: training memory from 1.2 TB to 350 GB, a checkpoint from 350 GB to
35 MB at r=4 on query and value, and a hundred tasks from 35 TB to 354 GB. Nothing is loaded.

    python benchmarks/gpt3_arithmetic.py --output benchmarks/results/gpt3_arithmetic.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorakit.environment import command_line, versions
from lorakit.files import write_json
from lorakit.planner.plan import RunPlan, RunRequest, plan_run

NUM_TASKS = 100
HALF_BYTES = 2


def main() -> None:
    """Count both runs, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="where the result goes")
    args = parser.parse_args()
    full, lora = _plan("full", {}), _plan("lora", {"r": 4, "targets": "qv"})
    base_bytes = full.num_base_params * HALF_BYTES
    adapter_bytes = lora.report.num_trainable * HALF_BYTES
    rows = {
        "parameters": {"paper": 175_255_800_000, "planner": full.num_base_params},
        "trained by LoRA": {"paper": 18_800_000, "planner": lora.report.num_trainable},
        "training, full, without activations": {
            "paper": 1_200_000_000_000,
            "planner": full.training.memory.least_bytes,
        },
        "training, LoRA, without activations": {
            "paper": 350_000_000_000,
            "planner": lora.training.memory.least_bytes,
        },
        "checkpoint, full": {"paper": 350_000_000_000, "planner": base_bytes},
        "checkpoint, LoRA, 16 bit": {"paper": 35_000_000, "planner": adapter_bytes},
        "checkpoint, LoRA, float32 as written": {
            "paper": None,
            "planner": lora.checkpoint_bytes,
        },
        "100 tasks, full": {"paper": 35_000_000_000_000, "planner": NUM_TASKS * base_bytes},
        "100 tasks, LoRA, 16 bit": {
            "paper": 354_000_000_000,
            "planner": base_bytes + NUM_TASKS * adapter_bytes,
        },
    }
    for name, row in rows.items():
        print(f"{name:<40} paper {row['paper'] or 0:>20,}  planner {row['planner']:>20,}")
    record: dict[str, Any] = {
        "title": "GPT-3 175B: the paper's arithmetic and the planner's",
        "kind": "gpt3_arithmetic",
        "command": command_line(),
        "versions": versions(),
        "rows": rows,
        "memory": {
            "full": full.training.memory.to_json(),
            "lora": lora.training.memory.to_json(),
            "lora_checkpointing": _plan(
                "lora", {"r": 4, "targets": "qv"}, recompute=True
            ).training.memory.to_json(),
        },
    }
    for name, memory in record["memory"].items():
        print(name, {term: f"{size / 1e9:.1f} GB" for term, size in memory.items() if size})
    if args.output is not None:
        write_json(args.output, record)


def _plan(method: str, options: dict[str, Any], *, recompute: bool = False) -> RunPlan:
    """One row of 2,048 tokens, everything in 16 bit."""
    return plan_run(
        RunRequest(
            model="gpt3-175b",
            method=method,
            options=options,
            batch_size=1,
            length=2048,
            dtype="bfloat16",
            precision="bf16",
            gradient_checkpointing=recompute,
            device="cuda",
        )
    )


if __name__ == "__main__":
    main()
