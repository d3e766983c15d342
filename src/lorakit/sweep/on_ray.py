"""The arms of a sweep on the machines of a Ray cluster; what they reach is on a disk they share.

Every worker prepares the sweep for itself, loads the base once and trains groups of arms as one
process would. Arms cross by name; checkpoints, metrics and adapters are in the output directory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.environment import versions
from lorakit.errors import LorakitError, RequestError, WorkError
from lorakit.files import write_text
from lorakit.progress import Bar
from lorakit.sweep.arms import Arm
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.plan import SweepPlan, plan_sweep
from lorakit.sweep.work import ArmTrainer, Stop, groups_of, paused
from lorakit.train.record import WarningLog
from lorakit.train.run import Say

_STOP = ".stop"
_WAIT_S = 0.5
# What must be the same for the same arm to be the same run.
_SAME = ("lorakit", "torch", "transformers")


@dataclass(frozen=True)
class _StopFile:
    """A file that says to all workers that the sweep is to stop."""

    path: Path

    @property
    def requested(self) -> bool:
        """Whether it is there."""
        return self.path.exists()


class _Counter:
    """A bar that is shown elsewhere."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Count."""
        self.steps += steps


@dataclass(frozen=True)
class _Told:
    """What a worker tells after a piece of work: steps taken, lines, an error of lorakit."""

    steps: int
    lines: list[str]
    error: LorakitError | None


class Worker:
    """One process of the cluster: a base, and the arms it is given.

    Args:
        values: the sweep, as plain values.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._config = SweepConfig.from_dict(values)
        self._plan: SweepPlan | None = None
        self._trainer: ArmTrainer | None = None
        self._lines: list[str] = []
        self._warned = WarningLog(show=False)

    def about(self) -> dict[str, Any]:
        """Its versions, and whether it sees the output directory."""
        return {"versions": versions(), "sees_output": self._config.output.is_dir()}

    def train(self, names: list[str], until: int | None) -> _Told:
        """Bring arms to a step, or to their end."""
        bar = _Counter()
        stop = _StopFile(self._config.output / _STOP)
        error = self._try(lambda work, arms: work.train(arms, until, bar, stop), names)
        return self._told(bar.steps, error)

    def end(self, names: list[str]) -> _Told:
        """Save adapters and records."""
        return self._told(0, self._try(lambda work, arms: work.end(arms), names))

    def _try(self, work: Any, names: list[str]) -> LorakitError | None:
        try:
            with self._warned:
                trainer = self._ready()
                arms = [arm for arm in trainer.plan.arms if arm.name in names]
                work(trainer, arms)
        except LorakitError as error:
            return error
        return None

    def _ready(self) -> ArmTrainer:
        if self._trainer is None:
            plan = plan_sweep(self._config)
            self._trainer = ArmTrainer(plan, self._lines.append, self._warned.messages)
        return self._trainer

    def _told(self, steps: int, error: LorakitError | None) -> _Told:
        lines, self._lines[:] = list(self._lines), []
        return _Told(steps, lines, error)


class RayEngine:
    """Trains arms on the workers of a cluster.

    Args:
        plan: the sweep.
        say: takes a line for the user.
        ray: the module.
        workers: handles of `Worker` actors.
    """

    def __init__(self, plan: SweepPlan, say: Say, ray: Any, workers: Sequence[Any]) -> None:
        self._plan = plan
        self._say = say
        self._ray = ray
        self._workers = list(workers)
        self._stop = plan.config.output / _STOP

    def train(self, arms: Sequence[Arm], until: int | None, bar: Bar, stop: Stop) -> None:
        """See `lorakit.sweep.work.Engine.train`."""
        self._stop.unlink(missing_ok=True)
        try:
            self._spread(arms, lambda worker, names: worker.train.remote(names, until), bar, stop)
        finally:
            self._stop.unlink(missing_ok=True)

    def end(self, arms: Sequence[Arm]) -> None:
        """See `lorakit.sweep.work.Engine.end`."""
        self._spread(arms, lambda worker, names: worker.end.remote(names), None, None)

    def _spread(self, arms: Sequence[Arm], start: Any, bar: Bar | None, stop: Stop | None) -> None:
        """Give groups of arms to whoever is free, until all are done.

        Raises:
            LorakitError: what the first worker that failed says; the others finish their group.
            TrainingPaused: it was to stop.
            WorkError: a worker died.
        """
        each = -(-len(arms) // len(self._workers))
        waiting = [[a.name for a in g] for g in groups_of(arms, min(self._plan.together, each))]
        free, running, error = list(self._workers), {}, None
        while running or (waiting and error is None and not self._stop.exists()):
            while waiting and free and error is None and not self._stop.exists():
                worker = free.pop()
                running[start(worker, waiting.pop(0))] = worker
            if stop is not None and stop.requested and not self._stop.exists():
                write_text(self._stop, "")
            done, _ = self._ray.wait(list(running), timeout=_WAIT_S)
            for task in done:
                free.append(running.pop(task))
                told = self._told(task)
                if bar is not None:
                    bar.advance(told.steps)
                error = error or told.error
        if waiting and error is None:
            error = paused(self._plan.config.output)
        if error is not None:
            raise error

    def _told(self, task: Any) -> _Told:
        try:
            told: _Told = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            raise WorkError(
                "a worker of the Ray cluster died or failed",
                where="--engine ray",
                found=str(error).strip().splitlines()[-1],
                remedy="run the same command again: finished arms are kept, the others go on from "
                "their checkpoints",
            ) from error
        for line in told.lines:
            self._say(line)
        return told


@contextmanager
def ray_engine(plan: SweepPlan, say: Say, num_workers: int | None) -> Iterator[RayEngine]:
    """The workers of the Ray cluster that RAY_ADDRESS names, or of one that is started here.

    Args:
        plan: the sweep; its output directory exists and is seen by every machine.
        say: takes a line for the user.
        num_workers: how many; None: one for each GPU, or else for each machine.

    Raises:
        RequestError: the cluster cannot give so many workers, or they are not like this process.
    """
    ray = importlib.import_module("ray")
    ours = not ray.is_initialized()
    if ours:
        # Workers see the code and the settings of this process where the cluster is started here.
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    workers: list[Any] = []
    try:
        workers = _start(ray, plan, num_workers)
        say(f"ray: {len(workers)} workers")
        yield RayEngine(plan, say, ray, workers)
    finally:
        for worker in workers:
            with suppress(ray.exceptions.RayError):
                ray.kill(worker)
        if ours:
            ray.shutdown()


def require_ray() -> None:
    """Check that Ray is installed, before any work is done.

    Raises:
        RequestError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise RequestError(
            "Ray is not installed",
            where="--engine ray",
            remedy='pip install "lorakit[ray]", or leave --engine out',
        )


def _start(ray: Any, plan: SweepPlan, num_workers: int | None) -> list[Any]:
    resources: dict[str, float] = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    wanted = num_workers or num_gpus or len(ray.nodes())
    most = num_gpus or num_cpus
    if wanted > most:
        raise RequestError(
            "the Ray cluster cannot give each worker a device of its own",
            where="--workers",
            expected=f"at most {most}",
            found=str(wanted),
            remedy="ask for fewer, or add machines: ray start --address=...",
        )
    options = {"num_cpus": max(1, num_cpus // wanted), "num_gpus": 1 if num_gpus else 0}
    # Relative paths are those of this process.
    values = {**plan.config.to_dict(), "output": str(plan.config.output.resolve())}
    make = ray.remote(**options)(Worker)
    workers = [make.remote(values) for _ in range(wanted)]
    mine = versions()
    for about in ray.get([worker.about.remote() for worker in workers]):
        _require_alike(about, mine, plan)
    return workers


def _require_alike(about: dict[str, Any], mine: dict[str, Any], plan: SweepPlan) -> None:
    theirs = about["versions"]
    other = [f"{name} {theirs.get(name)}" for name in _SAME if theirs.get(name) != mine.get(name)]
    if other:
        raise RequestError(
            "a machine of the Ray cluster has other versions",
            where="--engine ray",
            expected=", ".join(f"{name} {mine.get(name)}" for name in _SAME),
            found=", ".join(other),
            remedy="install the same versions everywhere",
        )
    if not about["sees_output"]:
        raise RequestError(
            "a machine of the Ray cluster does not see the output directory",
            where=str(plan.config.output),
            expected="a directory on a disk that all machines share",
            remedy="choose an output there",
        )
