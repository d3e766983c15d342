"""Run a sweep: rung by rung, as many arms in a batch as fit, resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorakit.errors import WorkError
from lorakit.files import only_writer, require_free, write_text
from lorakit.progress import Bar, progress
from lorakit.sweep.arms import Arm
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.files import ArmFiles
from lorakit.sweep.plan import SweepPlan, plan_sweep
from lorakit.sweep.rungs import survivors
from lorakit.sweep.summary import Ended, document
from lorakit.sweep.write import write_results
from lorakit.train.base import LoadedBase, load_base
from lorakit.train.interrupt import Interrupt, TrainingPaused
from lorakit.train.member import Member
from lorakit.train.objectives.base import GroupLearner
from lorakit.train.record import WarningLog
from lorakit.train.run import Say, say_on_stderr
from lorakit.train.together import Together

_CONFIG = "sweep.yaml"


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


def sweep(config: SweepConfig, *, say: Say = say_on_stderr) -> SweepResult:
    """Train every arm over one base, and write sweep.json, report.html, arms/ and best/.

    Each arm is equal to `lorakit train arms/NAME/config.yaml`; arms that are finished are not run
    again, the others go on from their checkpoints.

    Args:
        config: the sweep.
        say: takes each line that tells the user what is planned and done.

    Raises:
        RequestError: what is asked for cannot be; nothing was written.
        WorkError: every arm failed.
        TrainingPaused: Ctrl-C or SIGTERM; the same call goes on.
    """
    output = config.output
    if not (output / _CONFIG).is_file():
        require_free(output)
    plan = plan_sweep(config)
    for line in plan.lines():
        say(line)
    started = time.perf_counter()
    with only_writer(output), WarningLog() as warned:
        run = _Sweep(plan, say, warned.messages)
        run.check()
        write_text(output / _CONFIG, config.to_yaml())
        run.all_rungs()
        found = document(plan, run.ended, seconds=time.perf_counter() - started)
        best = write_results(output, found)
    if all(arm.failed for arm in run.ended.values()):
        raise WorkError(
            "every arm failed",
            where=str(output / "sweep.json"),
            found=next(str(arm.failed) for arm in run.ended.values()),
            remedy="lower train.lr, or set train.max_grad_norm",
        )
    return SweepResult(directory=output, document=found, best=best)


class _Sweep:
    """The arms of a sweep while they are trained."""

    def __init__(self, plan: SweepPlan, say: Say, warned: list[str]) -> None:
        self.plan = plan
        self.say = say
        self.warned = warned
        self.files = {arm.name: ArmFiles(arm) for arm in plan.arms}
        self.ended: dict[str, Ended] = {}
        self._base: LoadedBase | None = None
        self._learner: GroupLearner | None = None

    def check(self) -> None:
        """Refuse an arm that was begun under another config, before anything is trained.

        Raises:
            ConfigError: there is one.
        """
        done = 0
        for files in self.files.values():
            done += files.record() is not None
            if files.failure() is None:
                files.start()
        if done:
            self.say(f"{done} of {len(self.files)} arms are finished")

    def all_rungs(self) -> None:
        """Train every arm to its end, or to the rung where it is dropped."""
        alive = list(self.plan.arms)
        with ExitStack() as stack:
            bar = stack.enter_context(progress("sweep", self.plan.num_steps))
            interrupt = stack.enter_context(Interrupt())
            for rung in self.plan.rungs:
                if len(alive) < 2:
                    break
                self._train(alive, rung, bar, interrupt)
                names = [arm.name for arm in alive]
                losses = {name: self._loss_at(name, rung) for name in names}
                kept = survivors(names, losses, self.plan.config.sweep.halving)
                dropped = [arm for arm in alive if arm.name not in kept]
                alive = [arm for arm in alive if arm.name in kept]
                self._end([arm for arm in dropped if losses[arm.name] is not None], rung)
                self._note_failed(dropped)
                self.say(f"step {rung}: {', '.join(kept) or 'no arm'} of {len(names)} go on")
            self._train(alive, None, bar, interrupt)
            self._end(alive, None)
            self._note_failed(alive)

    def _loss_at(self, name: str, rung: int) -> float | None:
        files = self.files[name]
        return None if files.failure() is not None else files.loss_at(rung)

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
        """Bring these arms to a step, or to their end, as many at a time as share a batch."""
        waiting = [arm for arm in arms if not self._has_reached(arm, until)]
        for group in _groups(waiting, self.plan.together):
            members = self._members(group)
            with self._together(list(members.values())) as together:
                _advance(together, self._learn(), until, bar, interrupt)
            for name, member in members.items():
                if member.failed is not None:
                    self.files[name].fail(member.failed)
                    self.say(f"{name} failed: {member.failed}")

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
        for group in _groups(open_arms, self.plan.together):
            members = self._members(group)
            with self._together(list(members.values())):
                for member in members.values():
                    member.finish(beside=self.plan.together - 1, warned=self.warned)
        for arm in arms:
            files = self.files[arm.name]
            record = files.record()
            if record is not None:
                files.remove_checkpoints()
                self.ended[arm.name] = Ended(
                    record=record, dropped_at=rung, failed=None, lines=files.lines()
                )

    def _members(self, group: Sequence[Arm]) -> dict[str, Member]:
        members: dict[str, Member] = {}
        for number, arm in enumerate(group):
            members[arm.name] = Member(
                arm.config,
                self.plan.prepared[arm.name],
                adapter=f"member{number}",
                start=self.files[arm.name].start(),
            )
        for member in members.values():
            member.course.open()
        return members

    def _together(self, members: Sequence[Member]) -> Together:
        return Together(self._loaded(), members, self._learn())

    def _loaded(self) -> LoadedBase:
        """The base, loaded when the first arm needs it."""
        if self._base is None:
            first = self.plan.arms[0]
            self._base = load_base(first.config, self.plan.prepared[first.name])
            if self._base.quantization is not None:
                self.say(f"base in {self._base.quantization}")
        return self._base

    def _learn(self) -> GroupLearner:
        if self._learner is None:
            first = self.plan.arms[0]
            prepared = self.plan.prepared[first.name]
            method = first.config.make_method(prepared.beside)
            made = prepared.objective.bind(self._loaded().model, method, fresh=True)
            self._learner = cast(GroupLearner, made)
        return self._learner


def _groups(arms: Sequence[Arm], size: int) -> Iterator[Sequence[Arm]]:
    for start in range(0, len(arms), size):
        yield arms[start : start + size]


def _advance(
    together: Together,
    learner: GroupLearner,
    until: int | None,
    bar: Bar,
    interrupt: Interrupt,
) -> None:
    """Step the members that are not there yet; each has a checkpoint of where it stops.

    Raises:
        TrainingPaused: a signal came; every member is saved.
    """

    def waits(member: Member) -> bool:
        return not member.over and (until is None or member.step < until)

    while active := [member for member in together.members if waits(member)]:
        together.step(active)
        for member in active:
            if member.failed is None:
                member.after_step(learner)
            if member.failed is None and (interrupt.requested or not waits(member)):
                member.save_once()
        losses = [member.loss for member in active]
        bar.advance(
            len(active), note=f"{len(active)} arms, loss {min(losses):.3f} to {max(losses):.3f}"
        )
        if interrupt.requested:
            raise TrainingPaused(
                "the sweep was stopped; every arm's last step is saved",
                where=str(Path(active[0].config.output).parent),
                remedy="run the same command to go on",
            )
