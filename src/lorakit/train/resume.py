"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.environment import versions
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    DataError,
    LorakitWarning,
    OutputError,
)
from lorakit.evaluate.rewards import function_hashes
from lorakit.files import require_free
from lorakit.train.beginning import hashes
from lorakit.train.checkpoints import Checkpoint, CheckpointStore
from lorakit.train.config import TrainConfig
from lorakit.train.prepare import Preparation
from lorakit.train.schema import changed_keys

# What a resumed run may change: how long, how often, how much is kept, where. Everything else
# would make it another run.
MAY_CHANGE = frozenset(
    {
        "output",
        "train.epochs",
        "train.max_steps",
        "train.max_minutes",
        "train.eval_every",
        "train.eval_batch_size",
        "train.save_every",
        "train.keep_checkpoints",
        "train.early_stopping_patience",
        "train.tensorboard",
    }
)

CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
# What a run leaves that was killed before its first checkpoint.
_BEFORE_A_STEP = frozenset({CHECKPOINTS, CONFIG, "metrics.jsonl", "tensorboard", ".lock"})
BATCH_SIZE = "train.batch_size"


def identity(config: TrainConfig, prepared: Preparation) -> dict[str, Any]:
    """What decides every bit of the run, as a checkpoint keeps it."""
    return {
        "config": config.to_dict(),
        "data": prepared.data.hashes(),
        "adapters": hashes(config.beginnings),
        "rewards": function_hashes(config.grpo.weights),
        "max_steps": prepared.max_steps,
        "rows_together": config.train.batch_size * prepared.num_processes,
        "machine": {
            "num_processes": prepared.num_processes,
            "torch": versions()["torch"],
            "transformers": versions()["transformers"],
            "num_threads": torch.get_num_threads(),
            "device": prepared.device.type,
            "bf16": prepared.bf16,
        },
    }


def find_start(config: TrainConfig, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run that begins at its first step.

    That is a fresh run into a free directory, or one that is resumed and reached no checkpoint.

    Raises:
        OutputError: a fresh run into a directory that is not empty, or nothing to resume from.
        ConfigError: the config is not the one of the run that is resumed.
    """
    if not resume:
        require_free(config.output, past_killed=True)
        return None
    output = Path(config.output)
    store = CheckpointStore(output / CHECKPOINTS, keep=config.train.keep_checkpoints)
    checkpoint = store.last()
    if checkpoint is None and not store.steps() and _only_begun(output):
        _refuse_changes(TrainConfig.from_yaml(output / CONFIG).to_dict(), config)
        return None
    if checkpoint is None:
        raise OutputError(
            "there is no checkpoint to resume from",
            where=str(store.directory),
            expected="a directory written by an earlier run",
            found="an empty place" if not store.steps() else "damaged checkpoints only",
            remedy="start the run afresh, without resume, into an empty directory",
        )
    _refuse_changes(checkpoint.identity["config"], config)
    return _with_best(checkpoint, store) if config.train.keep_best else checkpoint


def _only_begun(output: Path) -> bool:
    """Whether a run began here and was killed before its first checkpoint."""
    if not (output / CONFIG).is_file():
        return False
    names = {entry.name for entry in output.iterdir()}
    return all(name in _BEFORE_A_STEP or name.endswith(".partial") for name in names)


def _refuse_changes(before: dict[str, Any], config: TrainConfig) -> None:
    changed = changed_keys(before, config.to_dict())
    # The rows that all processes take together may not change; see `check_same_run`.
    refused = [key for key in changed if key not in MAY_CHANGE and key != BATCH_SIZE]
    if refused:
        raise ConfigError(
            "the config is not the one this run was started with",
            where=", ".join(refused),
            expected=f"the values in {Path(config.output) / 'config.yaml'}; only "
            f"{', '.join(sorted(MAY_CHANGE))} may change",
            remedy="resume with that file, or start a new run with another output",
        )


def _with_best(checkpoint: Checkpoint, store: CheckpointStore) -> Checkpoint:
    best = checkpoint.state.best_step
    if best is None or isinstance(store.read(best), Checkpoint):
        return checkpoint
    warnings.warn(
        f"the best checkpoint so far, step {best}, is gone or damaged; the best one is now looked "
        f"for from step {checkpoint.step} on",
        LorakitWarning,
        stacklevel=3,
    )
    state = replace(
        checkpoint.state, best_step=None, best_loss=None, best_score=None, num_evals_since_best=0
    )
    return replace(checkpoint, state=state)


def check_same_run(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """Compare what only the prepared run knows with the checkpoint.

    Raises:
        ConfigError: the processes together take more or fewer rows than they did; or a reward
            function is another one.
        DataError: the rows are not the same.
        AdapterFileError: an adapter that the run begins with, or is compared with, is another one.

    Warns:
        LorakitWarning: the length of the run changed under a schedule, or the machine did.
    """
    then = checkpoint.identity
    _check_same_batch(then, now)
    for split, sha256 in now["data"].items():
        if then["data"][split] != sha256:
            raise DataError(
                f"the {split} rows are not the ones this run was started with",
                where=f"data.{split}",
                expected=f"content with SHA-256 {then['data'][split]}",
                found=str(sha256),
                remedy="put the old rows back, or start a new run",
            )
    for key, sha256 in now["adapters"].items():
        if then.get("adapters", {}).get(key) != sha256:
            raise AdapterFileError(
                "the adapter is not the one this run was started with",
                where=key,
                expected=f"content with SHA-256 {then.get('adapters', {}).get(key)}",
                found=sha256,
                remedy="put the old adapter back, or start a new run",
            )
    for name, sha256 in now["rewards"].items():
        if then.get("rewards", {}).get(name, sha256) != sha256:
            raise ConfigError(
                "the reward function is not the one this run was started with",
                where=f"grpo.reward: {name}",
                expected=f"a file with SHA-256 {then['rewards'][name]}",
                found=sha256,
                remedy="put the old file back, or begin a new run with continue_from",
            )
    schedule = now["config"]["train"]["schedule"]
    if then["max_steps"] != now["max_steps"] and schedule != "constant":
        warnings.warn(
            f"the run now has {now['max_steps']} steps in place of {then['max_steps']}: from here "
            f"on the {schedule} schedule is laid over the new length",
            LorakitWarning,
            stacklevel=3,
        )
    changed = changed_keys({"num_processes": 1, **then["machine"]}, now["machine"])
    if changed:
        shown = ", ".join(
            f"{key} {then['machine'].get(key)} -> {now['machine'].get(key)}" for key in changed
        )
        warnings.warn(
            f"the run goes on, but not bit for bit as it would have: {shown}",
            LorakitWarning,
            stacklevel=3,
        )


def _check_same_batch(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Processes may come and go; the order of the rows is that of the rows taken together."""
    before = then.get("rows_together", then["config"]["train"]["batch_size"])
    if before == now["rows_together"]:
        return
    num = now["machine"]["num_processes"]
    fits = before % num == 0
    raise ConfigError(
        "the processes together take another number of rows than this run was started with",
        where=BATCH_SIZE,
        expected=f"batch_size x processes = {before}",
        found=f"{now['config']['train']['batch_size']} x {num}",
        remedy=f"resume with {BATCH_SIZE}={before // num}"
        if fits
        else f"resume in a number of processes that divides {before}",
    )


def check_same_base(checkpoint: Checkpoint, sha256: str) -> None:
    """Compare the base's fingerprint with the checkpoint's.

    Raises:
        BaseMismatchError: the base's weights are not the same.
    """
    expected = checkpoint.identity["base_sha256"]
    if expected != sha256:
        raise BaseMismatchError(
            "the base is not the one this run was started with",
            where="model.ref",
            expected=f"fingerprint {expected}",
            found=sha256,
            remedy="put the old weights back, or start a new run",
        )
