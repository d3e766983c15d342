"""Cells of a comparison that are trained together: which can be, and their training.

LoRA runs of one length on one base are trained as the arms of a sweep, their rows in one batch,
each equal to its run alone. What is measured of such a run is shared: its time is a part of the
batch's, by rows, and its memory is that of all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorakit.compare.cells import Cell
from lorakit.errors import RequestError, TrainingError
from lorakit.files import read_back, write_json
from lorakit.progress import progress
from lorakit.sweep.arms import Arm, require_beside
from lorakit.sweep.files import ArmFiles
from lorakit.sweep.plan import ArmsPlan, plan_arms
from lorakit.sweep.work import ArmTrainer
from lorakit.train.config import TrainConfig
from lorakit.train.interrupt import Interrupt
from lorakit.train.record import WarningLog
from lorakit.train.resume import CHECKPOINTS
from lorakit.train.run import say_on_stderr
from lorakit.train.yaml import read_mapping

# Beside a cell's files: which cells it was begun with. Such a cell goes on as it began.
BESIDE = "beside.json"


def can_share(config: TrainConfig) -> bool:
    """Whether this run may have others beside it; its model is asked later, by `plan_beside`."""
    try:
        require_beside(config)
    except RequestError:
        return False
    return config.train.max_minutes is None


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells, in their order, that may be trained together; single ones are left out."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.config is not None and cell.kind != "probe" and can_share(cell.config):
            found.setdefault(_alike(cell), []).append(cell)
    return [group for group in found.values() if len(group) > 1]


def _alike(cell: Cell) -> str:
    """What cells that share their batches have in common."""
    config = cell.config
    assert config is not None
    values = config.to_dict()
    train = values["train"]
    names = ("max_steps", "epochs", "batch_size", "gradient_accumulation", "precision")
    same = [cell.kind, config.task, values["model"], values["data"]]
    # Arms of task classify share the start of their head, which the seed decides.
    seed = config.seed if config.task == "classify" else None
    return json.dumps([*same, seed, train["gradient_checkpointing"], *map(train.get, names)])


def begun(config: TrainConfig) -> bool:
    """Whether a cell has checkpoints to go on from."""
    return (Path(config.output) / CHECKPOINTS).is_dir()


def plan_beside(configs: Sequence[TrainConfig]) -> ArmsPlan:
    """The runs, checked and prepared; writes nothing.

    Raises:
        RequestError: why they cannot share their batches.
    """
    arms = [Arm(name=config.output, settings={}, config=config) for config in configs]
    return plan_arms(arms)


def train_beside(configs: Sequence[TrainConfig]) -> None:
    """Train the runs in this process, those together that fit; goes on where they were broken off.

    Writes what `train` writes for each. A run whose loss is not finite fails alone.

    Raises:
        RequestError: they cannot share their batches.
        TrainingPaused: a signal came; every run is saved.
    """
    for config in configs:
        _make_room(config, configs)
    waiting = [config for config in configs if not _is_over(config)]
    if not waiting:
        return
    plan = plan_beside(waiting)
    steps = sum(prepared.max_steps for prepared in plan.prepared.values())
    with WarningLog() as warned, Interrupt() as interrupt, progress("compare", steps) as bar:
        trainer = ArmTrainer(plan, say_on_stderr, warned.messages)
        trainer.train(plan.arms, None, bar, interrupt)
        done = [arm for arm in plan.arms if ArmFiles(arm).failure() is None]
        trainer.end(done)


def trained_beside(config: TrainConfig) -> dict[str, Any] | None:
    """The record of a run that was trained beside others; None where it was not, or not yet.

    Raises:
        TrainingError: it failed.
    """
    directory = Path(config.output)
    if not (directory / BESIDE).is_file() or not _is_same(config):
        return None
    files = _files(config)
    why = files.failure()
    if why is not None:
        raise TrainingError(why, where=str(directory))
    return files.record()


def beside(directory: Path) -> list[str]:
    """The cells that this one was begun with, its own among them; empty where it was alone."""
    file = directory / BESIDE
    if not file.is_file():
        return []
    remedy = f"remove {directory}; the cell is then run again"
    return list(read_back(file, "cells", of="a cell", remedy=remedy)["cells"])


def _files(config: TrainConfig) -> ArmFiles:
    return ArmFiles(Arm(name=config.output, settings={}, config=config))


def _is_over(config: TrainConfig) -> bool:
    files = _files(config)
    return files.record() is not None or files.failure() is not None


def _is_same(config: TrainConfig) -> bool:
    file = Path(config.output) / "config.yaml"
    return file.is_file() and TrainConfig.from_dict(read_mapping(file)) == config


def _make_room(config: TrainConfig, configs: Sequence[TrainConfig]) -> None:
    """Remove what is left of another run, and note which cells begin together."""
    directory = Path(config.output)
    if (directory / BESIDE).is_file() and _is_same(config):
        return
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    names = [_name(Path(other.output)) for other in configs]
    write_json(directory / BESIDE, {"cells": names})


def _name(directory: Path) -> str:
    """A cell's name: its directory and its method's."""
    return f"{directory.parent.name}/{directory.name}"
