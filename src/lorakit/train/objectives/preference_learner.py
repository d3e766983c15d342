"""The losses and metrics of DPO and IPO, ORPO, KTO on one model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters.attach import use
from lorakit.data.encode import IGNORED
from lorakit.errors import TrainingError
from lorakit.formatting import format_number
from lorakit.math.preference import (
    dpo_losses,
    ipo_losses,
    kto_losses,
    orpo_penalties,
    token_kl,
)
from lorakit.methods.base import Method
from lorakit.models.label_head import LabelHead, LabelLogits, evaluating
from lorakit.train.objectives.base import Inputs, Validated
from lorakit.train.preference_section import PreferenceSection

# Per token, in nats; an adapter that adds nothing gives the same bits, a changed base rounds.
_START_TOLERANCE = 1e-3
_START_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True, slots=True)
class _Answers:
    """Log-probabilities of the answers of a batch, each (answers,) in nats.

    Attributes:
        policy: of the model that is trained.
        reference: of what it is compared with; None for a task without.
        num_tokens: tokens of each answer.
        kl: (tokens,) KL(policy || reference) behind each start of an answer; None where it is not
            known: in a step that learns, and with a cached reference.
    """

    policy: Tensor
    reference: Tensor | None
    num_tokens: Tensor
    kl: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """Policy less reference."""
        if self.reference is None:
            raise ValueError("this task has no reference")
        return self.policy - self.reference


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is kept of a batch: rewards and log-probabilities (answers,), verdicts, KL (tokens,)."""

    rewards: Tensor
    logps: Tensor
    desirable: Tensor
    kl: Tensor | None

    def cpu(self) -> _Seen:
        """The same on the CPU."""
        kl = None if self.kl is None else self.kl.cpu()
        return _Seen(self.rewards.cpu(), self.logps.cpu(), self.desirable.cpu(), kl)


class PreferenceLearner:
    """The loss of a policy beside its reference: the same model with another adapter, or none.

    Args:
        model: with the method attached; trained in place by whoever steps.
        method: what is trained.
        task: dpo, orpo or kto.
        options: beta and the like.
        reference: the adapter's name on the model; None for the model with the method switched off.
        begins_at_reference: whether the first batch must find policy and reference the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        task: str,
        options: PreferenceSection,
        reference: str | None,
        begins_at_reference: bool,
    ) -> None:
        self.label_head = LabelHead(model)
        self._model = model
        self._method = method
        self._task = task
        self._options = options
        self._named = reference
        self._to_check = begins_at_reference and task != "orpo"
        self._start: dict[str, float] = {}
        self._seen: list[_Seen] = []

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """Summed over pairs or answers and divided by those of the whole step.

        Raises:
            TrainingError: the policy does not begin at the reference.
        """
        if self._to_check:
            self._check_start(inputs)
        answers = self._answers(inputs)
        losses = self._losses(inputs, answers)
        self._seen.append(self._see(inputs, answers))
        return losses.sum() / (len(losses) if num_items is None else num_items.to(losses.device))

    def noted(self) -> dict[str, float]:
        """The metrics of the batches since the last call; KL with the first batch of a run."""
        found = {**self._metrics(self._seen), **self._start}
        self._seen, self._start = [], {}
        return found

    def observe(self, batches: Iterable[Inputs]) -> list[tuple[Tensor, _Seen]]:
        """The losses of each batch, and what is kept of it, on the CPU."""
        found: list[tuple[Tensor, _Seen]] = []
        for inputs in batches:
            answers = self._answers(inputs)
            found.append((self._losses(inputs, answers).cpu(), self._see(inputs, answers).cpu()))
        return found

    def conclude(self, observed: Sequence[list[tuple[Tensor, _Seen]]]) -> Validated:
        """Mean loss; how often, and by how much, the better answer has the higher reward."""
        batches = [batch for some in observed for batch in some]
        each = torch.cat([losses for losses, _ in batches]).double()
        seen = [part for _, part in batches]
        return Validated(loss=float(each.mean()), num_items=len(each), metrics=self._metrics(seen))

    def _see(self, inputs: Inputs, answers: _Answers) -> _Seen:
        rewards = self._rewards(answers).detach()
        num_answers = len(inputs["desirable"])  # behind them are the mismatched ones
        return _Seen(
            rewards=rewards[:num_answers],
            logps=answers.policy.detach()[:num_answers],
            desirable=inputs["desirable"].to(rewards.device),
            kl=answers.kl,
        )

    def _metrics(self, seen: Sequence[_Seen]) -> dict[str, float]:
        if not seen:
            return {}
        reward, logp, good = (
            torch.cat([part.rewards for part in seen]).double(),
            torch.cat([part.logps for part in seen]).double(),
            torch.cat([part.desirable for part in seen]),
        )
        found: dict[str, float] = {}
        for name, which in (("logp_chosen", good), ("logp_rejected", ~good)):
            if which.any():
                found[name] = float(logp[which].mean())
        if len(found) == 2:
            found["reward_margin"] = float(reward[good].mean() - reward[~good].mean())
        if self._task != "kto":
            pairs = [part.rewards.chunk(2) for part in seen]
            chosen, rejected = (torch.cat(side) for side in zip(*pairs, strict=True))
            # A tie is half a win: before the first step policy and reference are the same.
            wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
            found["reward_accuracy"] = float(wins.mean())
        kls = [part.kl for part in seen if part.kl is not None]
        if kls:
            found["kl"] = float(torch.cat(kls).double().mean())
        return found

    def _losses(self, inputs: Inputs, answers: _Answers) -> Tensor:
        """(pairs,) or (answers,) float32."""
        beta = self._options.beta
        if self._task == "orpo":
            chosen, rejected = (answers.policy / answers.num_tokens).chunk(2)
            return -chosen + beta * orpo_penalties(chosen, rejected)
        if self._task == "kto":
            return self._kto(inputs["desirable"], answers)
        if self._options.loss == "ipo":
            chosen, rejected = (answers.ratio / answers.num_tokens).chunk(2)
            return ipo_losses(chosen, rejected, beta=beta)
        chosen, rejected = answers.ratio.chunk(2)
        smoothing = self._options.label_noise
        return dpo_losses(chosen, rejected, beta=beta, label_smoothing=smoothing)

    def _kto(self, desirable: Tensor, answers: _Answers) -> Tensor:
        ratio, mismatched = answers.ratio.chunk(2)
        kl = mismatched.detach().mean().clamp(min=0)
        good = desirable.to(ratio.device)
        options = self._options
        weight = torch.where(good, options.desirable_weight, options.undesirable_weight)
        return weight * kto_losses(ratio, good, kl, beta=options.beta)

    def _rewards(self, answers: _Answers) -> Tensor:
        """What a policy implicitly values an answer at, (answers,)."""
        if answers.reference is None:
            return self._options.beta * answers.policy / answers.num_tokens
        return self._options.beta * answers.ratio

    def _answers(self, inputs: Inputs) -> _Answers:
        batch = _model_inputs(inputs)
        num_rows, learning = len(batch["labels"]), torch.is_grad_enabled()
        # The reference comes first: what it needs is given back before the policy keeps anything.
        needed = self._task != "orpo" and "reference" not in inputs
        other = self._reference_logits(batch) if needed else None
        reference = inputs.get("reference") if other is None else _logps(other, num_rows)
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)
        kl = None
        if learning:
            del other
            policy = self._policy(batch, num_rows)
        else:
            found = self.label_head.logits(batch)
            policy = _logps(found, num_rows)
            if other is not None:
                asked = found.rows < len(inputs["desirable"])
                kl = token_kl(found.logits[asked], other.logits[asked])
        return _Answers(policy, reference, num_tokens.to(policy.device), kl)

    def _policy(self, batch: dict[str, Tensor], num_rows: int) -> Tensor:
        """The answers with gradient; mismatched ones behind them without."""
        if self._task != "kto":
            return _logps(self.label_head.logits(batch), num_rows)
        half = num_rows // 2
        parts = [
            {k: v[rows] for k, v in batch.items()} for rows in (slice(half), slice(half, None))
        ]
        with torch.no_grad():
            mismatched = _logps(self.label_head.logits(parts[1]), half)
        return torch.cat([_logps(self.label_head.logits(parts[0]), half), mismatched])

    def reference(self, inputs: Inputs) -> Tensor:
        """(answers,) in nats, without gradient and without dropout."""
        batch = _model_inputs(inputs)
        return _logps(self._reference_logits(batch), len(batch["labels"]))

    def _reference_logits(self, batch: dict[str, Tensor]) -> LabelLogits:
        model = self._model
        off = self._method.disabled(model) if self._named is None else use(model, self._named)
        with torch.no_grad(), evaluating(model), off:
            return self.label_head.logits(batch)

    def _check_start(self, inputs: Inputs) -> None:
        """The policy must begin at the reference: distance 0, and so a DPO loss of log 2.

        Otherwise what is called the reference is another model than the one that is trained, and
        every reward is measured from the wrong place.
        """
        self._to_check = False
        with torch.no_grad(), evaluating(self._model):
            answers = self._answers(inputs)
            loss = float(self._losses(inputs, answers).mean())
        half = torch.is_autocast_enabled(answers.policy.device.type) or any(
            p.dtype != torch.float32 for p in self._model.parameters()
        )
        allowed = _START_TOLERANCE_HALF if half else _START_TOLERANCE
        distance = float((answers.ratio.abs() / answers.num_tokens).max())
        if answers.kl is not None:
            self._start = {"kl": float(answers.kl.double().mean())}
            distance = max(distance, self._start["kl"])
        if not distance <= allowed:
            raise TrainingError(
                "the policy does not begin at its reference",
                where=f"the first batch of task {self._task}",
                expected=f"log-probabilities that agree to {allowed:g} nats per token, KL 0",
                found=format_number(distance),
                remedy="train a method that leaves the model as it was at the start",
            )
        most = self._options.beta * float(answers.num_tokens.max())
        is_dpo = self._task == "dpo" and self._options.loss == "sigmoid"
        if is_dpo and not abs(loss - math.log(2)) <= allowed * max(1.0, most):
            raise TrainingError(
                "the first loss is not log 2, and the policy begins at its reference",
                where=f"the first batch of task {self._task}",
                expected=format_number(math.log(2)),
                found=format_number(loss),
                remedy="this is an error of lorakit: report it with the config",
            )


def _model_inputs(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}


def _logps(found: LabelLogits, num_rows: int) -> Tensor:
    """Log-probability of each row's answer, (num_rows,) float32 in nats."""
    return -found.row_nll(num_rows)
