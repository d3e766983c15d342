"""Does the plan tell the truth: memory and time of real training runs, predicted and measured.

Each row is one `lorakit train` in a process of its own: its record holds the memory that was
predicted before anything was loaded and the most that the process held above what it held before
the base was loaded. In another process a micro-step on random weights of the same shape
(`lorakit plan --calibrate`) predicts the time of a step; what is measured is the median step of the
run. Rows of one length, so that every step is the step that was planned.

    python benchmarks/plan_truth.py --output benchmarks/results/plan_truth.json
    python benchmarks/plan_truth.py --only 3 0        # some rows, printed
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMOLLM2, MINILM = "smollm2-135m-instruct", "minilm-l6-v2"
ALL_LINEAR = {"r": 8, "targets": "all-linear"}
STEPS = 4
MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.25


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: what is trained how, and on what batch."""

    model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int
    length: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """In one line."""
        recomputed = ", activations recomputed" if self.checkpointing else ""
        return f"{self.model}, {self.method}, {self.batch_size} x {self.length}{recomputed}"


def _rows() -> list[Row]:
    found: list[Row] = []
    for checkpointing in (False, True):
        small: dict[str, Any] = {
            "model": SMOLLM2,
            "batch_size": 4,
            "length": 192,
            "checkpointing": checkpointing,
        }
        found += [
            Row(method="lora", options=ALL_LINEAR, **small),
            Row(method="full", **small),
            Row(method="houlsby", options={"bottleneck": 32}, **small),
        ]
        encoder: dict[str, Any] = {
            "model": MINILM,
            "batch_size": 32,
            "length": 128,
            "checkpointing": checkpointing,
        }
        found += [
            Row(method="lora", options=ALL_LINEAR, **encoder),
            Row(method="full", **encoder),
            Row(method="bitfit", **encoder),
        ]
    return found


ROWS = _rows()


def main() -> None:
    """Run every row, print the table, write the result."""
    args = _arguments()
    if args.calibrate is not None:
        print(json.dumps(_calibrate(json.loads(args.calibrate))))
        return
    measured: list[dict[str, Any]] = []
    for row in ROWS if args.only is None else [ROWS[number] for number in args.only]:
        measured.append(measure(row))
        print(_line(measured[-1]), flush=True)
        if args.output is not None:
            _write(args.output, measured)


def measure(row: Row) -> dict[str, Any]:
    """One row: the run, the micro-step, and both predictions beside what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        record = _train(row, Path(folder))
    plan = record["plan"]
    steps = record["step_s"]
    question = {**_fields(row), "batch": plan["batch"]}
    predicted_s = _in_a_process(__file__, "--calibrate", json.dumps(question))["step_s"]
    measured_s = statistics.median(steps[1:])
    return {
        "name": row.name,
        **_fields(row),
        "batch": plan["batch"],
        "memory": plan["memory"],
        "terms": record["memory"]["estimate"],
        "time": {
            "predicted_s": predicted_s,
            "measured_s": measured_s,
            "ratio": predicted_s / measured_s,
        },
    }


def _fields(row: Row) -> dict[str, Any]:
    return {
        "model": row.model,
        "method": row.method,
        "options": row.options,
        "checkpointing": row.checkpointing,
    }


def _train(row: Row, folder: Path) -> dict[str, Any]:
    """The run's record, and the seconds of its steps."""
    data, output = folder / "rows.jsonl", folder / "run"
    # One token per word in both vocabularies; longer than is kept, so that every row is cut.
    words = ["the", "house", "of", "a", "new", "friend", "is", "good"]
    lines: list[str] = []
    for i in range(row.batch_size * STEPS):
        text = " ".join(words[(i + j) % len(words)] for j in range(row.length))
        if row.model == MINILM:
            lines.append(json.dumps({"text": text, "label": ["no", "yes"][i % 2]}))
        else:
            half = len(text) // 2
            lines.append(json.dumps({"prompt": text[:half], "completion": text[half:]}))
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "model": {"ref": row.model},
        "data": {"train": str(data), "max_length": row.length},
        "task": "classify" if row.model == MINILM else "sft",
        "output": str(output),
        "method": row.method,
        row.method: row.options,
        "train": {
            "epochs": 1,
            "batch_size": row.batch_size,
            "precision": "fp32",
            "gradient_checkpointing": row.checkpointing,
        },
    }
    if row.model != MINILM:
        config["data"] |= {"template": "none", "add_eos": False}
    file = folder / "config.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    _in_a_process("-m", "lorakit.cli.main", "train", str(file), "--json")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    log = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record["step_s"] = [s["step_s"] for s in map(json.loads, log) if "step_s" in s]
    return record


def _calibrate(question: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the time of a micro-step of that shape."""
    from lorakit.planner.plan import RunRequest, plan_run

    batch = question["batch"]
    request = RunRequest(
        model=question["model"],
        method=question["method"],
        options=question["options"],
        batch_size=batch["rows"],
        length=batch["length"],
        labels=batch["labels"] or None,
        classes=2 if question["model"] == MINILM else None,
        precision="fp32",
        gradient_checkpointing=question["checkpointing"],
        device="cpu",
    )
    return {"step_s": plan_run(request).calibrated().step_s}


def _in_a_process(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def _line(one: dict[str, Any]) -> str:
    memory, time = one["memory"], one["time"]
    return (
        f"{one['name']:<70} memory {memory['predicted_bytes'] / 1e6:7.0f} MB predicted, "
        f"{memory['measured_bytes'] / 1e6:7.0f} measured ({memory['ratio']:.2f}); "
        f"step {time['predicted_s']:.2f} s, {time['measured_s']:.2f} measured "
        f"({time['ratio']:.2f})"
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from lorakit.environment import command_line, hardware, versions
    from lorakit.files import write_json

    write_json(
        path,
        {
            "title": "the plan's truth: predicted and measured memory and time of training runs",
            "kind": "plan_truth",
            "command": command_line(),
            "hardware": hardware(),
            "versions": versions(),
            "tolerance": {"memory": MEMORY_TOLERANCE, "time": TIME_TOLERANCE},
            "rows": rows,
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="where the result goes")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="some rows, from 0")
    parser.add_argument("--calibrate", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
