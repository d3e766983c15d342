"""What a run leaves in writing: the passport of its adapter, and run.json."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit.environment import hardware, peak_memory_bytes, versions
from lorakit.errors import LorakitWarning
from lorakit.methods.base import TrainableReport
from lorakit.train.beginning import hashes
from lorakit.train.checkpoints import RunState
from lorakit.train.config import TrainConfig
from lorakit.train.metrics import Line
from lorakit.train.objectives.registry import best_metric
from lorakit.train.prepare import Preparation

# The time of a run is predicted from so many of its first steps, where it has enough of them.
_CALIBRATION_STEPS, _FEWEST_STEPS = 3, 8


class Clock:
    """Seconds by phase, and in all."""

    def __init__(self) -> None:
        self._started = self._marked = time.perf_counter()
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """End a phase that began at the mark before."""
        now = time.perf_counter()
        self._phases[phase] = now - self._marked
        self._marked = now

    def seconds(self) -> dict[str, float]:
        """The phases so far, and "total_s"."""
        return {**self._phases, "total_s": time.perf_counter() - self._started}


class WarningLog:
    """Notes the LorakitWarnings shown inside its block; they are shown all the same.

    Args:
        show: whether they are; of several processes the first one shows its own, and the record
            has those of all.

    Attributes:
        messages: their texts, each once.
    """

    def __init__(self, *, show: bool = True) -> None:
        self.messages: list[str] = []
        self._is_shown = show
        self._show: Callable[..., None] = warnings.showwarning

    def __enter__(self) -> WarningLog:
        self._show = warnings.showwarning
        warnings.showwarning = self._note
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        warnings.showwarning = self._show

    def _note(self, message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, LorakitWarning) and str(message) not in self.messages:
            self.messages.append(str(message))
        if self._is_shown:
            self._show(message, category, *place)


def passport(config: TrainConfig, prepared: Preparation) -> dict[str, Any]:
    """What every adapter of this run says about where it comes from."""
    report = prepared.data.train.report
    saved = hashes(config.beginnings)
    return {
        "model": config.model.ref,
        **({"adapters": saved} if saved else {}),
        "data": prepared.data.to_json(),
        **prepared.objective.facts(),
        "tokenizer_sha256": report.tokenizer_sha256,
        "template_sha256": report.template_sha256,
        "seed": config.seed,
        "versions": versions(),
        "base_dtype": _dtype_name(prepared),
        "config": config.to_dict(),
    }


def run_record(
    config: TrainConfig,
    prepared: Preparation,
    report: TrainableReport,
    *,
    state: RunState,
    lines: list[Line],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The content of run.json: plain values only.

    A run that had others beside it (`facts["beside"]`) shares the memory of its process with them,
    so that no prediction stands beside a measurement.
    """
    beside = facts.get("beside", 0)
    peak_bytes = peak_memory_bytes()
    return {
        "kind": "train",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "base": {
            "ref": config.model.ref,
            "num_params": prepared.num_base_params,
            "bytes": prepared.memory.weights_bytes,
            "dtype": _dtype_name(prepared),
            "sha256": facts["base_sha256"],
            "quantization": facts["quantization"],
        },
        "adapter": _adapter_facts(config, report),
        "data": prepared.data.to_json(),
        **_course(config, prepared, state, lines, facts["final"]),
        **prepared.objective.facts(),
        "timing": facts["timing"],
        "memory": {
            "estimate": prepared.memory.to_json(),
            "free_before_bytes": prepared.free_bytes,
            "process_bytes": facts["process_bytes"],
            "loaded_bytes": facts["loaded_bytes"],
            "peak_bytes": peak_bytes,
        },
        **(
            {"beside": beside}
            if beside
            else {"plan": _plan_and_truth(prepared, peak_bytes - facts["process_bytes"], lines)}
        ),
        "precision": "bf16" if prepared.bf16 else "fp32",
        "device": prepared.device.type,
        "num_processes": prepared.num_processes,
        "seed": config.seed,
        "versions": versions(),
        "hardware": hardware(),
        "warnings": facts["warnings"],
    }


def _dtype_name(prepared: Preparation) -> str:
    """What the base was kept in; the config may leave it to the method and the device."""
    return str(prepared.dtype).removeprefix("torch.")


def _plan_and_truth(
    prepared: Preparation, measured_bytes: int, lines: list[Line]
) -> dict[str, Any]:
    """What was predicted beside what was measured; memory above that of the process itself."""
    predicted_bytes = prepared.memory.total_bytes
    return {
        "batch": asdict(prepared.batch),
        "memory": {
            "predicted_bytes": predicted_bytes,
            "measured_bytes": measured_bytes,
            "ratio": predicted_bytes / max(1, measured_bytes),
        },
        "time": _predicted_time([line for line in lines if "loss" in line]),
    }


def _predicted_time(steps: list[Line]) -> dict[str, Any] | None:
    """The time of all steps at the pace of the first few; None where there are too few steps."""
    if len(steps) < _FEWEST_STEPS:
        return None
    # The first step also fills caches and makes the optimizer's state.
    first = steps[1 : 1 + _CALIBRATION_STEPS]
    pace = sum(line["step_s"] for line in first) / max(1, sum(s["num_tokens"] for s in first))
    predicted_s = pace * sum(line["num_tokens"] for line in steps)
    measured_s = sum(line["step_s"] for line in steps)
    return {
        "calibrated_on_steps": len(first),
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "ratio": predicted_s / max(measured_s, 1e-9),
    }


def _adapter_facts(config: TrainConfig, report: TrainableReport) -> dict[str, Any]:
    path = Path(config.output) / "adapter"
    return {
        "method": config.method,
        "options": config.options,
        "path": str(path),
        "trainable_params": report.num_trainable,
        "trainable_share": report.share,
        "num_sites": len(report.sites),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "notes": list(report.notes),
        **({"ranks": dict(report.ranks)} if report.ranks else {}),
    }


def _course(
    config: TrainConfig,
    prepared: Preparation,
    state: RunState,
    lines: list[Line],
    final: Any,
) -> dict[str, Any]:
    """How far the run came, how well and how fast."""
    train_lines = [line for line in lines if "loss" in line]
    eval_lines = [line for line in lines if "eval_loss" in line]
    busy_s = max(state.busy_s, 1e-9)
    return {
        "steps": {
            "done": train_lines[-1]["step"] if train_lines else 0,
            "max": prepared.max_steps,
            "per_epoch": prepared.steps_per_epoch,
            "stopped_early": state.stopped_early,
            "sessions": state.num_sessions,
        },
        "metrics": {
            "final": final,
            "first_loss": train_lines[0]["loss"] if train_lines else None,
            "last_loss": train_lines[-1]["loss"] if train_lines else None,
            "best_by": best_metric(config, prepared.objective),
            "best_step": state.best_step,
            "best_eval_loss": state.best_loss,
            "best_score": state.best_score,
            "last_eval_loss": eval_lines[-1]["eval_loss"] if eval_lines else None,
        },
        "speed": {
            "busy_s": state.busy_s,
            "tokens_per_s": state.num_tokens / busy_s,
            "examples_per_s": state.num_examples / busy_s,
            "num_tokens": state.num_tokens,
            "num_examples": state.num_examples,
        },
    }
