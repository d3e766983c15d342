"""Checkpoints that are whole or do not exist: staged, listed in a manifest, renamed, verified."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.errors import LorakitWarning, TrainingError
from lorakit.files import atomic_directory, read_json, write_json, writing
from lorakit.methods.base import Method

MANIFEST = "checkpoint.json"
ADAPTER = "adapter"
STATE = "trained.safetensors"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a run knows beyond transformers' own state, as of one step.

    Attributes:
        best_step: the step with the best validation so far, None before the first.
        best_loss: its loss.
        best_score: its metric, where a metric decides what is best; higher is better.
        num_evals_since_best: validations in a row without a new best.
        num_tokens: tokens trained on so far, padding left out.
        num_examples: rows trained on so far.
        busy_s: seconds spent in training steps so far, over all sessions.
        num_sessions: how often the run was started or resumed.
        stopped_early: whether the patience ran out.
    """

    best_step: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    num_evals_since_best: int = 0
    num_tokens: int = 0
    num_examples: int = 0
    busy_s: float = 0.0
    num_sessions: int = 1
    stopped_early: bool = False

    def after_step(self, num_tokens: int, num_examples: int, seconds: float) -> RunState:
        """The state after an optimizer step on so many rows."""
        return replace(
            self,
            num_tokens=self.num_tokens + num_tokens,
            num_examples=self.num_examples + num_examples,
            busy_s=self.busy_s + seconds,
        )

    def after_evaluation(
        self, step: int, loss: float, patience: int | None, *, score: float | None = None
    ) -> RunState:
        """The state after a validation: the lowest loss is best, or the highest score.

        Of equal scores the one with the lower loss is better.
        """
        if self._is_better(loss, score):
            return replace(
                self, best_step=step, best_loss=loss, best_score=score, num_evals_since_best=0
            )
        since = self.num_evals_since_best + 1
        stopped = patience is not None and since >= patience
        return replace(self, num_evals_since_best=since, stopped_early=stopped)

    def _is_better(self, loss: float, score: float | None) -> bool:
        if self.best_loss is None:
            return True
        if score is None or self.best_score is None:
            return loss < self.best_loss
        return (score, -loss) > (self.best_score, -self.best_loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One whole checkpoint on disk.

    Attributes:
        path: its directory.
        step: the optimizer step it was written after.
        state: the run's own state at that step.
        identity: what must be the same when the run goes on (config, data, versions).
    """

    path: Path
    step: int
    state: RunState
    identity: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def adapter(self) -> Path:
        """The directory of its adapter."""
        return self.path / ADAPTER


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they are; made when the first is written.
        keep: how many of the newest stay when one is written.
        keep_best: whether the best one stays beside.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_best: bool = True) -> None:
        self.directory = Path(directory)
        self.keep = keep
        self.keep_best = keep_best

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is or would be."""
        return self.directory / f"{_PREFIX}{step:08d}"

    @contextmanager
    def write(self, step: int, state: RunState, identity: dict[str, Any]) -> Iterator[Path]:
        """A directory to fill; it becomes the step's checkpoint only if the block succeeds.

        Older checkpoints beyond `keep` are removed afterwards, the best one perhaps excepted.

        Raises:
            OutputError: the disk refuses; nothing is left half-written.
        """
        with atomic_directory(self.path_of(step), replace=True) as staging:
            yield staging
            manifest = {
                "step": step,
                "state": asdict(state),
                "identity": identity,
                "files": _list_files(staging),
            }
            write_json(staging / MANIFEST, manifest)
        self._rotate(step, state.best_step if self.keep_best else None)

    def last(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None.

        Warns:
            LorakitWarning: a newer one is damaged and was passed over.
        """
        for step in sorted(self.steps(), reverse=True):
            found = self.read(step)
            if isinstance(found, Checkpoint):
                return found
            warnings.warn(
                f"passed over the damaged checkpoint {self.path_of(step)}: {found}",
                LorakitWarning,
                stacklevel=2,
            )
        return None

    def require(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            TrainingError: it is not there or not whole.
        """
        found = self.read(step)
        if not isinstance(found, Checkpoint):
            raise TrainingError(
                f"the checkpoint of step {step} cannot be used",
                where=str(self.path_of(step)),
                found=found,
            )
        return found

    def read(self, step: int) -> Checkpoint | str:
        """The checkpoint of a step if it is whole, else what is wrong with it."""
        path = self.path_of(step)
        try:
            manifest = read_json(path / MANIFEST)
            state = RunState(**manifest["state"])
            for name, expected in manifest["files"].items():
                if not (path / name).resolve().is_relative_to(path.resolve()):
                    return f"{name} is outside of it"
                if _fingerprint(path / name) != expected:
                    return f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return Checkpoint(path=path, step=step, state=state, identity=manifest["identity"])

    def steps(self) -> list[int]:
        """The steps that have a checkpoint directory, whole or not, in order."""
        if not self.directory.is_dir():
            return []
        names = [p.name.removeprefix(_PREFIX) for p in self.directory.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def clean(self) -> None:
        """Remove what a kill left of half-written and half-removed checkpoints."""
        for pattern in (f".{_PREFIX}*.partial", f".{_PREFIX}*.removed", f".{_PREFIX}*.old-*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _rotate(self, newest: int, best: int | None) -> None:
        # Checkpoints beyond `newest` belong to a future that a resume from an older one undid.
        past = [step for step in self.steps() if step <= newest]
        keep = {*past[-self.keep :], best}
        for step in self.steps():
            if step not in keep:
                self._remove(step)

    def _remove(self, step: int) -> None:
        path = self.path_of(step)
        # Renamed first: a kill in the middle of the removal must not leave a damaged checkpoint.
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            # What was learned since is worth more than the space of an old checkpoint.
            warnings.warn(f"{path} stays: {error}", LorakitWarning, stacklevel=2)
        shutil.rmtree(doomed, ignore_errors=True)


def generators_of(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint of several processes keeps the random generators of one."""
    return checkpoint / f"process-{rank}"


def save_state(method: Method, model: nn.Module, directory: Path) -> None:
    """Write the learned tensors themselves, bit for bit, whatever the adapter's file layout does.

    Raises:
        OutputError: the disk refuses.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in method.state(model).items()
    }
    with writing(directory):
        save_file(tensors, str(directory / STATE))


def load_state(method: Method, model: nn.Module, directory: Path) -> None:
    """Put the learned tensors of a checkpoint back into the model, in place.

    Raises:
        AdapterFileError: they are not this adapter's.
    """
    method.load(model, load_file(str(directory / STATE)))


def _list_files(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): _fingerprint(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
