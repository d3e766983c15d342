"""One cell in a process of its own: train, score, measure, record.

A process for each cell, because the peak of a process's memory never falls: the second run in one
process would report the first one's. Cells that are trained together share a process, and what it
measures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorakit.compare.beside import BESIDE, beside, train_beside, trained_beside
from lorakit.compare.cells import RECORD
from lorakit.compare.latency import measure_latency
from lorakit.compare.scores import score_rows, validation_score
from lorakit.environment import hardware, versions
from lorakit.errors import LorakitError, OutputError, TrainingError, WorkError
from lorakit.files import write_json
from lorakit.train.checkpoints import CheckpointStore
from lorakit.train.config import TrainConfig
from lorakit.train.metrics import MetricsLog
from lorakit.train.resume import CHECKPOINTS
from lorakit.train.run import say_on_stderr, train
from lorakit.train.yaml import read_mapping

# An orphan of a killed comparison finishes its step and its checkpoint before it lets go.
_WAIT_FOR_ORPHAN_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one process is asked to do.

    Attributes:
        config: the run; its output is the cell's directory.
        header: what the record begins with: arm, kind, lr, seed, identity, sha256.
        measures: the options of the final score and of the latency; empty: neither.
        evaluation: rows of the final score and their split, or None.
        keep_weights: keep what was learned.
    """

    config: TrainConfig
    header: Mapping[str, Any]
    measures: Mapping[str, Any]
    evaluation: tuple[str, str | None] | None
    keep_weights: bool


def work(orders: Sequence[Order], log: str, pipe: Connection) -> None:
    """Run cells in this process; sends the error, or None, through the pipe.

    Everything that is printed goes to the log.
    """
    # Ctrl-C on the terminal is for the comparison; it passes it on once.
    os.setpgid(0, 0)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    _stop_with_parent()
    try:
        run_cells(orders)
    except LorakitError as error:
        say_on_stderr(str(error))
        pipe.send(error)
    except BaseException as error:
        text = traceback.format_exc()
        say_on_stderr(text)
        pipe.send(
            WorkError(
                f"a run failed: {type(error).__name__}: {error}",
                where=log,
                found=text.strip().splitlines()[-1],
                remedy="see the log; the finished runs are kept",
            )
        )
    else:
        pipe.send(None)


def run_cells(orders: Sequence[Order]) -> list[dict[str, Any]]:
    """Train, score and measure cells, and write their records; goes on where it was broken off.

    Several are trained together. A loss that is not finite is a result (this rate does not work),
    not an error.

    Returns:
        The records, as cell.json has them.

    Raises:
        RequestError: what is asked for cannot be.
        TrainingPaused: a signal came; the same orders go on.
    """
    with ExitStack() as stack:
        for order in orders:
            stack.enter_context(_locked(Path(order.config.output)))
        started = time.perf_counter()
        # A cell that was begun beside others goes on as it began.
        if len(orders) > 1 or (Path(orders[0].config.output) / BESIDE).is_file():
            train_beside([order.config for order in orders])
        each_s = (time.perf_counter() - started) / len(orders)
        return [_run_locked(order, Path(order.config.output), each_s) for order in orders]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{directory}.lock", timeout=_WAIT_FOR_ORPHAN_S):
            yield
    except Timeout as error:
        raise OutputError(
            "another process works on this cell",
            where=f"{directory}.lock",
            remedy="wait for it, or end it",
        ) from error


def _run_locked(order: Order, directory: Path, before_s: float) -> dict[str, Any]:
    """One cell of a process; `before_s` is its part of the time in which all were trained."""
    started = time.perf_counter() - before_s
    record: dict[str, Any] = {
        **order.header,
        "failed": None,
        "scores": {},
        "latency": None,
        "eval_loss": None,
        "final": {},
        "by": None,
        "eval_curve": [],
    }
    try:
        run = _trained(order.config, directory)
    except TrainingError as error:
        record["failed"] = str(error)
    else:
        record.update(_of_run(run), eval_curve=_eval_curve(directory))
        record.update(_shared(record, directory))
        record.update(_measured(order, directory, run))
    _clean(directory, keep_weights=order.keep_weights)
    record["seconds"] = time.perf_counter() - started
    record["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    record["versions"], record["hardware"] = versions(), hardware()
    # The record is the sign that the cell is finished, so it comes last.
    write_json(directory / RECORD, record)
    return record


def _trained(config: TrainConfig, directory: Path) -> dict[str, Any]:
    """The run's record: of a finished run, of one that goes on, or of a fresh one."""
    together = trained_beside(config)
    if together is not None:
        return together
    config_file, run_file = directory / "config.yaml", directory / "run.json"
    if config_file.is_file() and TrainConfig.from_dict(read_mapping(config_file)) == config:
        if run_file.is_file():
            return json.loads(run_file.read_text(encoding="utf-8"))
        keep = config.train.keep_checkpoints
        if CheckpointStore(directory / CHECKPOINTS, keep=keep).last() is not None:
            return train(config, resume=True).record
    if directory.exists():
        # What is left of a run that has no checkpoint, or of another config: nothing to go on from.
        shutil.rmtree(directory)
    return train(config).record


def _of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's record that a comparison is made of."""
    steps = max(1, run["steps"]["done"])
    memory = run["memory"]
    return {
        "eval_loss": run["metrics"]["final"]["eval_loss"],
        "final": run["metrics"]["final"],
        "by": run["metrics"]["best_by"],
        "trainable_params": run["adapter"]["trainable_params"],
        "trainable_share": run["adapter"]["trainable_share"],
        "checkpoint_bytes": run["adapter"]["bytes"],
        "steps": run["steps"]["done"],
        "sessions": run["steps"]["sessions"],
        "seconds_per_step": run["speed"]["busy_s"] / steps,
        "speed": run["speed"],
        "peak_bytes": memory["peak_bytes"],
        "base_bytes": memory.get("loaded_bytes"),
        "train_s": run["timing"]["total_s"],
        "precision": run["precision"],
        "notes": [*run["adapter"]["notes"], *run["warnings"]],
    }


def _shared(record: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What was measured of several cells at once is no measurement of this one."""
    cells = beside(directory)
    if len(cells) < 2:
        return {"trained": "alone"}
    measured = ("speed", "seconds_per_step", "peak_bytes", "base_bytes", "train_s")
    return {
        "trained": "together",
        "together_with": [name for name in cells if name != record["cell"]],
        "shared": {name: record[name] for name in measured},
        **dict.fromkeys(measured),
    }


def _eval_curve(directory: Path) -> list[list[float]]:
    lines = MetricsLog(directory / "metrics.jsonl").read()
    return [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line]


def _measured(order: Order, directory: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    weights = directory / "adapter"
    if "eval" in order.measures:
        if order.evaluation is None:
            found["scores"] = validation_score(run)
        else:
            found["scores"] = score_rows(
                order.config, weights, order.evaluation, order.measures["eval"]
            )
    if "latency" in order.measures:
        found["latency"] = measure_latency(order.config, weights, **order.measures["latency"])
    return found


def _clean(directory: Path, *, keep_weights: bool) -> None:
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    if not keep_weights:
        shutil.rmtree(directory / "adapter", ignore_errors=True)


def _stop_with_parent() -> None:
    """Ask this process to stop, as Ctrl-C would, when the comparison that started it has died."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="stop with parent").start()
