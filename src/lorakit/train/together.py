"""Several adapters trained on one base in one batch: every row runs its own adapter.

The loss of a step is the sum of the members' losses, each divided by its own labels. Members have
no parameter in common, and a row sees no other row, so that the gradient of each is what it would
be alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.attach import detach, use
from lorakit.adapters.attachments import find_attachments
from lorakit.errors import ModelError
from lorakit.layers.rms_norm import use_fast_norms
from lorakit.models.checkpointing import checkpoint_activations, return_freed_memory
from lorakit.models.fast_layers import use_fast_layers
from lorakit.models.loss_share import LossShare
from lorakit.train.base import LoadedBase
from lorakit.train.member import Member
from lorakit.train.objectives.base import GroupLearner
from lorakit.train.steps import autocast

# How far the loss of a row may be from its loss alone: the order of sums, no more.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


class Together:
    """Members on one model, inside a `with` block; they come off at its end.

    Args:
        base: nothing attached.
        members: the runs; the same base, task and precision, no dropout.
        learner: the task's loss on this model.

    Raises:
        BaseMismatchError: a member's checkpoint was trained on another base.
    """

    def __init__(self, base: LoadedBase, members: Sequence[Member], learner: GroupLearner) -> None:
        self.base = base
        self.members = members
        self.learner = learner
        self._checked = len(members) < 2

    def __enter__(self) -> Together:
        model = self.base.model
        try:
            for member in self.members:
                member.attach(self.base)
            for member in self.members:
                member.make_ready()
        except BaseException:
            self._take_off()
            raise
        use_fast_norms(model)
        use_fast_layers(model)
        if self.members[0].config.train.gradient_checkpointing:
            checkpoint_activations(model)
            return_freed_memory(model.device)
        model.train()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._take_off()

    def _take_off(self) -> None:
        if find_attachments(self.base.model) is not None:
            detach(self.base.model)

    def step(self, members: Sequence[Member]) -> None:
        """One optimizer step of each of these members.

        A member whose loss or gradient is not finite fails alone; see `Member.failed`.

        Raises:
            ModelError: the model mixes the rows of a batch.
        """
        started = time.perf_counter()
        plans = [member.batches() for member in members]
        items = [member.num_items(plan) for member, plan in zip(members, plans, strict=True)]
        losses = [0.0] * len(members)
        for turn in range(max(map(len, plans))):
            here = [i for i, plan in enumerate(plans) if turn < len(plan)]
            found = self._pass(
                [members[i] for i in here],
                [plans[i][turn] for i in here],
                [items[i] for i in here],
            )
            for i, loss in zip(here, found, strict=True):
                losses[i] += loss
        counts = [sum(map(len, plan)) for plan in plans]
        seconds = time.perf_counter() - started
        for member, loss, plan, count in zip(members, losses, plans, counts, strict=True):
            member.take_step(loss, plan, seconds * count / sum(counts))

    def _pass(
        self, members: Sequence[Member], batches: Sequence[Sequence[Any]], items: Sequence[Tensor]
    ) -> list[float]:
        """One forward and backward pass; the members' losses."""
        lead = members[0]
        examples = [example for batch in batches for example in batch]
        rows = [m.adapter for m, batch in zip(members, batches, strict=True) for _ in batch]
        shares = [
            LossShare(len(batch), count, member.options.label_smoothing)
            for member, batch, count in zip(members, batches, items, strict=True)
        ]
        inputs = lead.on_device(lead.prepared.objective.collate(examples))
        alone = [] if self._checked else self._alone(members, batches, shares)
        # The backward pass is inside too: activations may be computed again.
        with use(self.base.model, rows):
            with autocast(self.base.model.device, bf16=lead.options.bf16):
                losses = torch.stack(self.learner.losses(inputs, shares))
            losses.sum().backward()
        found: list[float] = losses.tolist()
        if not self._checked:
            self._checked = True
            self._check(members, found, alone)
        return found

    def _alone(
        self,
        members: Sequence[Member],
        batches: Sequence[Sequence[Any]],
        shares: Sequence[LossShare],
    ) -> list[float]:
        """The losses of the same batches, one member at a time."""
        found: list[float] = []
        for member, batch, share in zip(members, batches, shares, strict=True):
            inputs = member.on_device(member.prepared.objective.collate(batch))
            with (
                torch.no_grad(),
                use(self.base.model, member.adapter),
                autocast(self.base.model.device, bf16=member.options.bf16),
            ):
                found.append(float(self.learner.losses(inputs, [share])[0]))
        return found

    def _check(
        self, members: Sequence[Member], found: Sequence[float], alone: Sequence[float]
    ) -> None:
        half = members[0].options.bf16 or self.base.model.dtype != torch.float32
        tolerance = _HALF_TOLERANCE if half else _TOLERANCE
        for member, loss, expected in zip(members, found, alone, strict=True):
            if abs(loss - expected) > tolerance * max(1.0, abs(expected)):
                raise ModelError(
                    "rows of one batch are not independent in this model: the first loss of a run "
                    "beside others is not its loss alone",
                    where=f"{type(self.base.model).__name__}, {member.config.output}",
                    expected=f"{expected:.6g}",
                    found=f"{loss:.6g}",
                    remedy="train one at a time: sweep.together=1",
                )
