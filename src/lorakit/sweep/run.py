"""Run a sweep: rung by rung, as many arms in a batch as fit, resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import RequestError, WorkError
from lorakit.files import only_writer, require_free, write_text
from lorakit.progress import Bar, progress
from lorakit.sweep.arms import Arm
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.files import ArmFiles
from lorakit.sweep.on_ray import ray_engine, require_ray
from lorakit.sweep.plan import SweepPlan, plan_sweep
from lorakit.sweep.rungs import survivors
from lorakit.sweep.summary import Ended, document
from lorakit.sweep.work import ArmTrainer, Engine
from lorakit.sweep.write import write_results
from lorakit.train.interrupt import Interrupt
from lorakit.train.merit import Merit
from lorakit.train.record import WarningLog
from lorakit.train.run import Say, say_on_stderr

_CONFIG = "sweep.yaml"

EngineName = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left.

    Attributes:
        directory: its output.
        document: what sweep.json says.
        best: the winner's adapter, or None where no arm can be called best.
    """

    directory: Path
    document: dict[str, Any]
    best: Path | None


def sweep(
    config: SweepConfig,
    *,
    say: Say = say_on_stderr,
    engine: EngineName = "local",
    workers: int | None = None,
) -> SweepResult:
    """Train every arm over one base, and write sweep.json, report.html, arms/ and best/.

    Each arm is equal to `lorakit train arms/NAME/config.yaml`; arms that are finished are not run
    again, the others go on from their checkpoints.

    Args:
        config: the sweep.
        say: takes each line that tells the user what is planned and done.
        engine: where arms are trained: in this process, or on the machines of a Ray cluster.
        workers: processes of the cluster; None: one for each GPU, or else for each machine.

    Raises:
        RequestError: what is asked for cannot be; nothing was written.
        WorkError: every arm failed.
        TrainingPaused: Ctrl-C or SIGTERM; the same call goes on.
    """
    require_engine(engine, workers)
    output = config.output
    if not (output / _CONFIG).is_file():
        require_free(output, past_killed=True)
    plan = plan_sweep(config)
    for line in plan.lines():
        say(line)
    started = time.perf_counter()
    with only_writer(output), WarningLog() as warned, ExitStack() as stack:
        trainer: Engine = ArmTrainer(plan, say, warned.messages)
        if engine == "ray":
            trainer = stack.enter_context(ray_engine(plan, say, workers))
        run = _Sweep(plan, say, trainer)
        run.check()
        write_text(output / _CONFIG, config.to_yaml())
        run.all_rungs()
        seconds = time.perf_counter() - started
        found = document(plan, run.ended, seconds=seconds, engine=engine)
        best = write_results(output, found)
    if all(arm.failed for arm in run.ended.values()):
        raise WorkError(
            "every arm failed",
            where=str(output / "sweep.json"),
            found=next(str(arm.failed) for arm in run.ended.values()),
            remedy="lower train.lr, or set train.max_grad_norm",
        )
    return SweepResult(directory=output, document=found, best=best)


def require_engine(engine: str, workers: int | None = None) -> None:
    """Refuse an engine that there is not, or not here.

    Raises:
        RequestError: with the reason.
    """
    if engine not in ("local", "ray"):
        raise RequestError(
            f"there is no engine {engine!r}", where="--engine", expected="local or ray"
        )
    if engine == "ray":
        require_ray()
    if workers is not None and (engine == "local" or workers < 1):
        raise RequestError(
            "workers are processes of a Ray cluster",
            where="--workers",
            expected="with --engine ray, at least 1",
            found=f"--engine {engine} --workers {workers}",
        )


class _Sweep:
    """The arms of a sweep while they are trained."""

    def __init__(self, plan: SweepPlan, say: Say, engine: Engine) -> None:
        self.plan = plan
        self.say = say
        self.engine = engine
        self.files = {arm.name: ArmFiles(arm) for arm in plan.arms}
        self.ended: dict[str, Ended] = {}

    def check(self) -> None:
        """Refuse an arm that was begun under another config, before anything is trained.

        Raises:
            ConfigError: there is one.
        """
        done = 0
        for files in self.files.values():
            if files.record() is not None:
                # A kill may have left a part of its checkpoints, which are not needed any more.
                done += 1
            elif files.failure() is None:
                files.start()
        if done:
            self.say(f"{done} of {len(self.files)} arms are finished")

    def all_rungs(self) -> None:
        """Train every arm to its end, or to the rung where it is dropped."""
        alive = list(self.plan.arms)
        with ExitStack() as stack:
            bar = stack.enter_context(progress("sweep", self.plan.num_steps))
            bar.advance(sum(self.files[arm.name].reached() for arm in alive))
            interrupt = stack.enter_context(Interrupt())
            for rung in self.plan.rungs:
                if len(alive) < 2:
                    break
                self._train(alive, rung, bar, interrupt)
                names = [arm.name for arm in alive]
                merits = {arm.name: self._merit_at(arm, rung) for arm in alive}
                kept = survivors(names, merits, self.plan.config.sweep.halving)
                dropped = [arm for arm in alive if arm.name not in kept]
                alive = [arm for arm in alive if arm.name in kept]
                self._end([arm for arm in dropped if merits[arm.name] is not None], rung)
                self._note_failed(dropped)
                self.say(f"step {rung}: {', '.join(kept) or 'no arm'} of {len(names)} go on")
            self._train(alive, None, bar, interrupt)
            self._end(alive, None)
            self._note_failed(alive)

    def _merit_at(self, arm: Arm, rung: int) -> Merit | None:
        files = self.files[arm.name]
        if files.failure() is not None:
            return None
        return files.merit_at(rung, self.plan.best_by(arm))

    def _note_failed(self, arms: Sequence[Arm]) -> None:
        for arm in arms:
            why = self.files[arm.name].failure()
            if why is not None:
                lines = self.files[arm.name].lines()
                self.ended[arm.name] = Ended(record=None, dropped_at=None, failed=why, lines=lines)

    # Training

    def _train(
        self, arms: Sequence[Arm], until: int | None, bar: Bar, interrupt: Interrupt
    ) -> None:
        """Bring these arms to a step, or to their end."""
        waiting = [arm for arm in arms if not self._has_reached(arm, until)]
        if waiting:
            self.engine.train(waiting, until, bar, interrupt)

    def _has_reached(self, arm: Arm, until: int | None) -> bool:
        files = self.files[arm.name]
        record = files.record()
        if record is not None or files.failure() is not None:
            return True
        start = files.start()
        if start is None:
            return False
        last = self.plan.prepared[arm.name].max_steps if until is None else until
        return start.step >= last or start.state.stopped_early

    def _end(self, arms: Sequence[Arm], rung: int | None) -> None:
        """Save the adapters of arms that are not trained any further."""
        open_arms = [
            arm
            for arm in arms
            if self.files[arm.name].record() is None and self.files[arm.name].failure() is None
        ]
        if open_arms:
            self.engine.end(open_arms)
        for arm in arms:
            files = self.files[arm.name]
            record = files.record()
            if record is not None:
                files.remove_checkpoints()
                self.ended[arm.name] = Ended(
                    record=record, dropped_at=rung, failed=None, lines=files.lines()
                )
