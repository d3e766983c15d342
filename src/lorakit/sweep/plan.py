"""What a sweep will do, before anything is loaded or written: arms, steps, memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorakit.errors import ConfigError, MemoryPlanError, ModelError, RequestError
from lorakit.formatting import format_bytes
from lorakit.models.packing import drops
from lorakit.planner.memory import MemoryEstimate
from lorakit.planner.step import BatchShape
from lorakit.sweep.arms import Arm, make_arms
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.rungs import num_kept, rungs
from lorakit.train.merit import merit_name
from lorakit.train.objectives.registry import best_metric
from lorakit.train.prepare import Preparation, estimate_batch, prepare

# Unless `together` says otherwise: beyond it a batch is large enough to keep a machine busy.
_MOST_TOGETHER = 8
_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True, kw_only=True)
class ArmsPlan:
    """Runs that may share their batches, before they start.

    Attributes:
        arms: the runs, in their order.
        prepared: each arm's name -> its run, prepared.
        together: how many share a batch.
        memory: at the fullest moment of a step of the largest of them.
        free_bytes: memory that was free.
    """

    arms: tuple[Arm, ...]
    prepared: dict[str, Preparation]
    together: int
    memory: MemoryEstimate
    free_bytes: int

    @property
    def comparable(self) -> bool:
        """Whether all arms are validated on the same rows, by the same number."""
        rows = {_validation(prepared) for prepared in self.prepared.values()}
        return len(rows) == 1 and len({self.best_by(arm) for arm in self.arms}) == 1

    def best_by(self, arm: Arm) -> str:
        """What decides how good the arm is: "loss", or a metric of its task."""
        return best_metric(arm.config, self.prepared[arm.name].objective)


@dataclass(frozen=True, kw_only=True)
class SweepPlan(ArmsPlan):
    """A sweep before it starts.

    Attributes:
        config: what was asked for.
        rungs: steps after which arms are dropped.
    """

    config: SweepConfig
    rungs: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all arms together, where none fails or runs out of patience."""
        most = [prepared.max_steps for prepared in self.prepared.values()]
        if not self.rungs:
            return sum(most)
        left, before, total = len(most), 0, 0
        for step in self.rungs:
            total += left * (step - before)
            left, before = num_kept(self.config.sweep.halving, left), step
        return total + left * (most[0] - before)

    def lines(self) -> list[str]:
        """The plan in sentences."""
        steps = sorted({p.max_steps for p in self.prepared.values()})
        shown = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        first = self.prepared[self.arms[0].name]
        found = [
            f"sweep: {len(self.arms)} arms of {shown} steps, {self.together} together in a batch; "
            f"{self.num_steps:,} steps in all",
            f"memory: {self.memory}, {format_bytes(self.free_bytes)} free",
        ]
        if self.rungs:
            halving = self.config.sweep.halving
            at = ", ".join(f"{step:,}" for step in self.rungs)
            by = merit_name(self.best_by(self.arms[0]))
            found.append(f"halving: after {at} steps the best {halving.keep:.0%} go on, by {by}")
        if not self.comparable:
            found.append(
                "note: arms are validated on different rows, or by different metrics, so that none "
                "is called best"
            )
        return [*found, *(f"note: {note}" for note in first.notes())]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "arms": [
                {
                    "name": arm.name,
                    "settings": dict(arm.settings),
                    "trainable_params": self.prepared[arm.name].plan.num_trainable,
                    "max_steps": self.prepared[arm.name].max_steps,
                }
                for arm in self.arms
            ],
            "together": self.together,
            "num_steps": self.num_steps,
            "rungs": list(self.rungs),
            "memory": self.memory.to_json(),
            "free_bytes": self.free_bytes,
        }


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Check and prepare every arm; nothing is loaded, nothing is written.

    Raises:
        RequestError: an arm that cannot be, alone or beside the others, with the reason.
        MemoryPlanError: the arms that are asked for together do not fit.
    """
    found = plan_arms(make_arms(config), together=config.sweep.together)
    _check_halving(config, found)
    max_steps = found.prepared[found.arms[0].name].max_steps
    return SweepPlan(
        **vars(found),
        config=config,
        rungs=rungs(config.sweep.halving, len(found.arms), max_steps),
    )


def plan_arms(arms: Sequence[Arm], *, together: int | None = None) -> ArmsPlan:
    """Check and prepare runs that are to share their batches; nothing is loaded or written.

    Args:
        arms: the runs, each of which `require_beside` accepts.
        together: how many share a batch; None: as many as fit.

    Raises:
        RequestError: an arm that cannot be, alone or beside the others, with the reason.
        MemoryPlanError: the arms that are asked for together do not fit.
    """
    prepared = _prepare_all(arms)
    runs = list(prepared.values())
    _check_model(runs[0].objective.empty_model(), runs)
    _check_shared(arms, runs)
    count, memory = _together(together, arms, prepared)
    return ArmsPlan(
        arms=tuple(arms),
        prepared=prepared,
        together=count,
        memory=memory,
        free_bytes=runs[0].free_bytes,
    )


def _prepare_all(arms: Sequence[Arm]) -> dict[str, Preparation]:
    prepared: dict[str, Preparation] = {}
    same_rows: dict[str, Preparation] = {}
    for arm in arms:
        data = arm.config.to_dict()["data"]
        held_out_by = arm.config.seed if arm.config.data.validation_share is not None else None
        key = json.dumps([data, held_out_by], sort_keys=True)
        try:
            found = prepare(arm.config, like=same_rows.get(key))
        except RequestError as error:
            raise type(error)(
                error.what,
                where=f"arm {arm.name}: {error.where}" if error.where else f"arm {arm.name}",
                expected=error.expected,
                found=error.found,
                remedy=error.remedy,
            ) from error
        same_rows.setdefault(key, found)
        prepared[arm.name] = found
    return prepared


def _validation(prepared: Preparation) -> str | None:
    return prepared.data.hashes()["validation"]


def _check_model(base: PreTrainedModel, runs: Sequence[Preparation]) -> None:
    """Refuse a base whose rows are not independent, or that draws random numbers."""
    name = type(base).__name__
    statistics = [n for n, module in base.named_modules() if isinstance(module, _STATISTICS)]
    experts = [site for run in runs for site in run.plan.sites if ".experts." in f".{site}."]
    base.train()
    refusals = (
        (
            bool(statistics),
            "this model normalises over the batch: what a row gives depends on the other rows",
            ", ".join(statistics[:4]),
            "train these runs one at a time with lorakit train",
        ),
        (
            drops(base),
            "this model drops activations at random: no arm would be its run alone",
            "a dropout above 0 in its configuration",
            "set its dropouts to 0 in its config.json, or train one at a time with lorakit train",
        ),
        (
            bool(experts),
            "experts see tokens of all rows in an order of their own: a row cannot name its "
            "adapter there",
            ", ".join(experts[:4]),
            "leave the experts out of lora.targets",
        ),
    )
    for refused, what, found, remedy in refusals:
        if refused:
            raise ModelError(what, where=name, found=found, remedy=remedy)


def _check_shared(arms: Sequence[Arm], runs: Sequence[Preparation]) -> None:
    if any(arm.config.train.max_minutes is not None for arm in arms):
        raise ConfigError(
            "arms are compared after the same steps, not after a time",
            where="train.max_minutes",
            expected="train.max_steps or train.epochs",
            remedy="leave train.max_minutes out",
        )
    if len({(run.device.type, run.dtype, run.bf16) for run in runs}) > 1:
        raise ConfigError("all arms share the forward pass", where="model and train.precision")
    heads = {json.dumps(run.objective.facts(), sort_keys=True) for run in runs}
    seeds = {arm.config.seed for arm in arms}
    if len(heads) > 1 or (runs[0].beside and len(seeds) > 1):
        raise ConfigError(
            "all arms of task classify share one base with one new head",
            where="seed and data",
            expected="the same seed, and rows with the same classes",
            remedy="train them one at a time with lorakit train",
        )


def _check_halving(config: SweepConfig, plan: ArmsPlan) -> None:
    every = config.sweep.halving.every
    if every is None:
        return
    lengths = sorted({prepared.max_steps for prepared in plan.prepared.values()})
    if len(lengths) > 1 or not plan.comparable:
        raise ConfigError(
            "halving compares arms of one length on the same validation rows by one metric",
            where="sweep.halving",
            expected="one data.validation, train.best_metric and train.max_steps",
            found=", ".join(
                [
                    f"{' or '.join(map(str, lengths))} steps",
                    *sorted({merit_name(plan.best_by(arm)) for arm in plan.arms}),
                ]
            ),
            remedy="leave halving out, or set them once for all arms",
        )
    if every >= lengths[0]:
        raise ConfigError(
            "no arm would be stopped: all have ended by the first decision",
            where="sweep.halving.every",
            expected=f"fewer than the {lengths[0]} steps of an arm",
            found=str(every),
            remedy="lower it, or leave halving out",
        )


def _together(
    asked: int | None, arms: Sequence[Arm], prepared: dict[str, Preparation]
) -> tuple[int, MemoryEstimate]:
    """How many arms share a batch, and what the largest such batch takes."""
    largest = sorted(arms, key=lambda arm: -prepared[arm.name].memory.total_bytes)
    count = min(asked or _MOST_TOGETHER, len(arms))
    while True:
        chosen = largest[:count]
        memory = _memory(chosen, [prepared[arm.name] for arm in chosen])
        free_bytes = prepared[chosen[0].name].free_bytes
        if memory.total_bytes <= free_bytes or count == 1:
            return count, memory
        if asked is not None:
            raise MemoryPlanError(
                f"{count} arms together do not fit in memory",
                where="sweep.together",
                expected=str(memory),
                found=f"{format_bytes(free_bytes)} free",
                remedy="lower sweep.together or train.batch_size; without sweep.together as many "
                "arms run together as fit",
            )
        count = max(1, count // 2)


def _memory(arms: Sequence[Arm], runs: Sequence[Preparation]) -> MemoryEstimate:
    """One run with the rows of all, and beside it what the other adapters keep."""
    if len(runs) == 1:
        return runs[0].memory
    shape = BatchShape(
        rows=sum(run.batch.rows for run in runs),
        length=max(run.batch.length for run in runs),
        labels=sum(run.batch.labels for run in runs),
    )
    lead = estimate_batch(arms[0].config, runs[0], shape)
    others = [run.memory for run in runs[1:]]
    # Adapter, two moments and a gradient, each as large.
    gradients = [m.trained_bytes - m.adapter_bytes - m.optimizer_bytes for m in others]
    return replace(
        lead,
        adapter_bytes=lead.adapter_bytes + sum(m.adapter_bytes for m in others),
        optimizer_bytes=lead.optimizer_bytes + sum(m.optimizer_bytes for m in others),
        gradients_bytes=lead.gradients_bytes + sum(gradients),
        trained_bytes=lead.trained_bytes + sum(m.trained_bytes for m in others),
    )
