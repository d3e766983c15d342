"""AdaLoRA in a run: after each step directions are judged, and those beyond the budget cut off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.adapters.attachments import adapted_layers, require_attached
from lorakit.adapters.budget import budget_params, cost_of
from lorakit.adapters.spec import MOVING
from lorakit.errors import AdapterFileError
from lorakit.files import writing
from lorakit.layers.low_rank import LowRank
from lorakit.math.sensitivity import (
    Smoothed,
    budget_at,
    far_from_orthonormal,
    keep_directions,
    triplet_scores,
)
from lorakit.methods.base import Method, TrainableReport
from lorakit.methods.lora import LoraMethod
from lorakit.train.adalora_section import AdaLoraSection

_FILE = "moving_ranks.safetensors"
_KEPT = "kept"
_TENSORS = ("lora_A", "lora_B", "singular")


@dataclass(frozen=True, slots=True)
class _Moving:
    """One update P diag(lambda) Q, what a direction of it costs, and what is known of its numbers.

    P is the update's lora_B, Q its lora_A.
    """

    update: LowRank
    values: nn.Parameter
    cost: int
    seen: dict[str, Smoothed]

    def scores(self) -> Tensor:
        """What each direction is worth, (r,)."""
        own = {name: smoothed.scores() for name, smoothed in self.seen.items()}
        return triplet_scores(own["lora_B"], own["singular"], own["lora_A"])


class MovingRanks:
    """The directions of one attached adapter, from more than the budget pays for down to it.

    The step and the share of the budget follow `AdaLoraSection`; sensitivities are taken from the
    weights behind the optimizer's step and the gradient that it used, as the authors' code does.
    Mutates the adapter's lambda.

    Args:
        model: with the adapter attached.
        method: its method, with ranks: adalora.
        options: the schedule.
        max_steps: of the run.

    Attributes:
        kept: which directions stay, site -> bool (r,), once the ranks have settled; else None.
        settled: the step from which they have.
    """

    def __init__(
        self, model: nn.Module, method: LoraMethod, options: AdaLoraSection, max_steps: int
    ) -> None:
        plan = require_attached(model, method.adapter_name)
        sites = plan.modules()
        self.options = options
        self.sites: dict[str, _Moving] = {}
        for layer in adapted_layers(model):
            branch = layer.branch_of(method.adapter_name)
            for site, update in zip(
                sites.get(layer.name, ()), branch.updates() if branch else (), strict=True
            ):
                assert update.singular is not None
                self.sites[site.name] = _Moving(
                    update,
                    update.singular,
                    cost_of(replace(site, learns_values=False)),
                    {name: Smoothed(update.get_parameter(name)) for name in _TENSORS},
                )
        self.last = budget_params(method.spec.budget or 0)
        self.first = sum(one.cost * len(one.values) for one in self.sites.values())
        self.warmup = round(options.warmup * max_steps)
        self.settled = max(self.warmup + 1, max_steps - round(options.final * max_steps))
        self.settled = min(self.settled, max_steps)
        self.kept: dict[str, Tensor] | None = None

    def penalty(self) -> Tensor:
        """How far each P and Q is from orthonormal, their mean, weighted; with gradients."""
        pairs = [(one.update.lora_B, one.update.lora_A) for one in self.sites.values()]
        # In bfloat16 a factor near orthonormal is not told from one that is.
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            each = [far_from_orthonormal(left, right) for left, right in pairs]
        return self.options.orthogonality * torch.stack(each).sum() / (2 * len(each))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Judge the directions by this step's gradients, and cut off what is due.

        Args:
            step: optimizer steps done, this one included.
        """
        if self.kept is None:
            for one in self.sites.values():
                for name, smoothed in one.seen.items():
                    weight = one.update.get_parameter(name)
                    if weight.grad is not None:
                        smoothed.see(weight, weight.grad, self.options.betas)
            if step >= self.settled:
                self.kept = self._chosen(step)
            elif step > self.warmup and step % self.options.every == 0:
                self._cut(self._chosen(step))
        if self.kept is not None:
            self._cut(self.kept)

    def _chosen(self, step: int) -> dict[str, Tensor]:
        budget = budget_at(
            step, first=self.first, last=self.last, warmup=self.warmup, settled=self.settled
        )
        return keep_directions(
            {name: one.scores().cpu() for name, one in self.sites.items()},
            {name: one.cost for name, one in self.sites.items()},
            budget,
        )

    def _cut(self, kept: dict[str, Tensor]) -> None:
        for name, one in self.sites.items():
            one.values.mul_(kept[name].to(one.values.device))

    def save(self, directory: Path) -> None:
        """Write what the next step needs beside a checkpoint's other files.

        Raises:
            OutputError: the disk refuses.
        """
        state = {
            f"{site}/{name}/{what}": value.cpu().contiguous()
            for site, one in self.sites.items()
            for name, seen in one.seen.items()
            for what, value in (("mean", seen.sensitivity), ("spread", seen.uncertainty))
        }
        for site, kept in (self.kept or {}).items():
            state[f"{site}/{_KEPT}"] = kept
        with writing(directory):
            save_file(state, str(directory / _FILE))

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            AdapterFileError: it is not this adapter's.
        """
        try:
            state = load_file(str(directory / _FILE))
            for site, one in self.sites.items():
                for name, seen in one.seen.items():
                    seen.sensitivity.copy_(state[f"{site}/{name}/mean"])
                    seen.uncertainty.copy_(state[f"{site}/{name}/spread"])
            names = {site: f"{site}/{_KEPT}" for site in self.sites}
            if any(name in state for name in names.values()):
                self.kept = {site: state[name] for site, name in names.items()}
        except (OSError, KeyError, RuntimeError) as error:
            raise AdapterFileError(
                "what the run knew of its ranks cannot be read",
                where=str(directory / _FILE),
                found=f"{type(error).__name__}: {error}",
                remedy="resume from another checkpoint, or start the run again",
            ) from error


class MovingRanksCallback(TrainerCallback):
    """Calls `MovingRanks.after_step` between the optimizer's step and the next gradient."""

    def __init__(self, ranks: MovingRanks) -> None:
        self._ranks = ranks

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The step is not counted yet."""
        self._ranks.after_step(state.global_step + 1)


def moving_ranks_of(
    method: Method, model: nn.Module, options: AdaLoraSection, max_steps: int
) -> MovingRanks | None:
    """The moving ranks of an attached method with ranks: adalora; None for every other."""
    if not isinstance(method, LoraMethod) or method.spec.ranks != MOVING:
        return None
    return MovingRanks(model, method, options, max_steps)


def ranks_now(method: Method, model: nn.Module, report: TrainableReport) -> TrainableReport:
    """The report with the ranks that moving ranks have come to; others are as they were."""
    if not isinstance(method, LoraMethod) or method.spec.ranks != MOVING:
        return report
    plan, ranks = require_attached(model, method.adapter_name), dict(report.ranks)
    for layer in adapted_layers(model):
        branch = layer.branch_of(method.adapter_name)
        sites = plan.modules().get(layer.name, ())
        for site, update in zip(sites, branch.updates() if branch else (), strict=True):
            ranks[site.name] = update.effective()[0].shape[0]
    return replace(report, ranks=ranks)
