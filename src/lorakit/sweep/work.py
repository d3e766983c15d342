"""The arms of a sweep, trained in this process: as many in a batch as the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from lorakit.progress import Bar
from lorakit.sweep.arms import Arm
from lorakit.sweep.files import ArmFiles
from lorakit.sweep.plan import ArmsPlan
from lorakit.train.base import LoadedBase, load_base
from lorakit.train.interrupt import TrainingPaused
from lorakit.train.member import Member
from lorakit.train.objectives.base import GroupLearner
from lorakit.train.run import Say
from lorakit.train.together import Together


class Stop(Protocol):
    """What says that the sweep is to stop."""

    @property
    def requested(self) -> bool:
        """Whether it is."""
        ...


class Engine(Protocol):
    """Where arms are trained; what they reach is on the disk."""

    def train(self, arms: Sequence[Arm], until: int | None, bar: Bar, stop: Stop) -> None:
        """Bring arms to a step, or to their end; one that fails says so in its directory.

        Raises:
            TrainingPaused: it was to stop; every arm is saved.
        """
        ...

    def end(self, arms: Sequence[Arm]) -> None:
        """Save adapter and record of arms that are not trained any further."""
        ...


class ArmTrainer:
    """Trains arms here; the base is loaded when the first one needs it.

    Args:
        plan: the runs, of a sweep or others.
        say: takes a line for the user.
        warned: what was warned of so far, for the records; read when an arm ends.
    """

    def __init__(self, plan: ArmsPlan, say: Say, warned: list[str]) -> None:
        self.plan = plan
        self.say = say
        self.warned = warned
        self.files = {arm.name: ArmFiles(arm) for arm in plan.arms}
        self._begun: set[str] = set()
        self._base: LoadedBase | None = None
        self._learner: GroupLearner | None = None

    def train(self, arms: Sequence[Arm], until: int | None, bar: Bar, stop: Stop) -> None:
        """See `Engine.train`."""
        for group in groups_of(arms, self.plan.together):
            members = self._members(group)
            with self._together(list(members.values())) as together:
                _advance(together, self._learn(), until, bar, stop)
            for name, member in members.items():
                if member.failed is not None:
                    self.files[name].fail(member.failed)
                    self.say(f"{name} failed: {member.failed}")

    def end(self, arms: Sequence[Arm]) -> None:
        """See `Engine.end`."""
        for group in groups_of(arms, self.plan.together):
            members = self._members(group)
            with self._together(list(members.values())):
                for member in members.values():
                    member.finish(beside=self.plan.together - 1, warned=self.warned)

    def _members(self, group: Sequence[Arm]) -> dict[str, Member]:
        members: dict[str, Member] = {}
        for number, arm in enumerate(group):
            members[arm.name] = Member(
                arm.config,
                self.plan.prepared[arm.name],
                adapter=f"member{number}",
                start=self.files[arm.name].start(),
                # The next rung, or the end, of what this process began.
                resumed=arm.name not in self._begun,
            )
            self._begun.add(arm.name)
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


def groups_of(arms: Sequence[Arm], size: int) -> Iterator[Sequence[Arm]]:
    """Arms in groups of at most so many, in their order."""
    for start in range(0, len(arms), size):
        yield arms[start : start + size]


def _advance(
    together: Together,
    learner: GroupLearner,
    until: int | None,
    bar: Bar,
    stop: Stop,
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
            if member.failed is None and (stop.requested or not waits(member)):
                member.save_once()
        losses = [member.loss for member in active]
        bar.advance(
            len(active), note=f"{len(active)} arms, loss {min(losses):.3f} to {max(losses):.3f}"
        )
        if stop.requested:
            raise paused(Path(active[0].config.output).parent)


def paused(where: Path) -> TrainingPaused:
    """The end of a sweep that was told to stop."""
    return TrainingPaused(
        "the sweep was stopped; every arm's last step is saved",
        where=str(where),
        remedy="run the same command to go on",
    )
