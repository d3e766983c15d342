"""Preference tuning: DPO and IPO, ORPO, KTO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.adapters.attach import use
from lorakit.adapters.bind import bind_adapter, plan_binding
from lorakit.data.collate import PreferenceCollator
from lorakit.data.encode import IGNORED
from lorakit.data.preference import Judged, PreferenceExamples, build_preferences
from lorakit.data.rows import Rows
from lorakit.errors import TrainingError
from lorakit.formatting import format_number
from lorakit.math.preference import dpo_losses, ipo_losses, kto_losses, orpo_penalties
from lorakit.methods.base import Method
from lorakit.models.empty import empty_model
from lorakit.models.label_head import LabelHead, LabelLogits, evaluating, require_head
from lorakit.train.beginning import BASE, read_reference
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import LOSS, ExampleSet, Inputs, Validated
from lorakit.train.objectives.base_model import load_to_pack
from lorakit.train.preference_section import PreferenceSection
from lorakit.train.reference_cache import cached_reference

# A prefix changes the model at once, so its policy does not begin at the reference.
_CHANGE_AT_ONCE = ("prefix_embedding", "prefix_layer")
# Per token, in nats; an adapter that adds nothing gives the same bits, a changed base rounds.
_START_TOLERANCE = 1e-3
_START_TOLERANCE_HALF = 5e-2
# The name of the adapter that the policy is compared with.
REFERENCE = "reference"


class PreferenceObjective:
    """What a preferred answer is preferred for.

    Args:
        config: the run.
        tokenizer: of the base.
    """

    best = LOSS
    unit = "rows"

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._paired = config.task != "kto"
        self._reference = read_reference(config.beginnings)
        # Verdicts of one kind alone have no margin, so for kto nothing can be chosen by it.
        self.metrics: tuple[str, ...] = ("reward_accuracy", "reward_margin") * self._paired
        pad = tokenizer.pad_token_id
        self._collator = PreferenceCollator(
            pad if isinstance(pad, int) else 0, mismatched=config.task == "kto"
        )

    def empty_model(self) -> PreTrainedModel:
        """The base as it is; the reference would bind to it."""
        base = empty_model(self._config.model.ref)
        require_head(base)
        if self._reference.adapter is not None:
            plan_binding(base, self._reference.adapter)
        return base

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The base, ready to be packed, with the adapter attached that is the reference."""
        model = load_to_pack(self._config.model, dtype)
        if self._reference.adapter is not None:
            bind_adapter(model, self._reference.adapter, REFERENCE)
        return model

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """Nothing: the base has its head."""
        return ()

    def build(self, rows: Rows, *, label: str) -> PreferenceExamples:
        """See `lorakit.data.preference.build_preferences`."""
        return build_preferences(
            rows, self._tokenizer, self._config.data, paired=self._paired, label=label
        )

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """See `lorakit.data.collate.PreferenceCollator`."""
        return self._collator(examples)

    def num_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Pairs, or single answers."""
        return torch.tensor(len(batch["desirable"]) // (2 if self._paired else 1))

    def most_labels(self, examples: ExampleSet, num_rows: int) -> int:
        """The answers' tokens of the examples that have most."""
        learned = sorted(
            (
                sum(answer.example.num_learned for answer in example.answers)
                for example in cast(PreferenceExamples, examples)
            ),
            reverse=True,
        )
        return sum(learned[:num_rows])

    def line(self, examples: ExampleSet) -> str:
        """Pairs or verdicts, and tokens."""
        report = cast(PreferenceExamples, examples).report
        kinds = f"{report.num_desirable:,} chosen and {report.num_undesirable:,} rejected answers"
        if not self._paired:
            kinds = f"{report.num_desirable:,} desirable and {report.num_undesirable:,} other ones"
        told = f"{kinds}, {report.num_tokens:,} tokens, {report.num_answer_tokens:,} of answers"
        against = ()
        if self._config.task != "orpo":
            elsewhere = "" if self._reference.is_start else ", where the policy does not begin"
            against = (f"reference: {self._reference.name}{elsewhere}",)
        return "; ".join((told, *against, *report.notes))

    def facts(self) -> dict[str, Any]:
        """What was preferred by which loss."""
        options = self._config.preference
        facts: dict[str, Any] = {"task": self._config.task, "beta": options.beta}
        if self._reference.sha256 is not None:
            facts["reference_sha256"] = self._reference.sha256
        return {"preference": facts}

    def with_model(
        self, examples: ExampleSet, model: PreTrainedModel, method: Method, facts: dict[str, Any]
    ) -> ExampleSet:
        """The examples with what the reference gives their answers, if that is to be cached."""
        config = self._config
        if not config.preference.cache_reference:
            return examples
        learner = self.bind(model, method, fresh=False)

        def compute(judged: Sequence[Judged]) -> Tensor:
            batch = self._collator(judged)
            return learner.reference({k: v.to(model.device) for k, v in batch.items()})

        return cached_reference(
            cast(PreferenceExamples, examples),
            {**facts, "reference": self._reference.sha256 or BASE},
            compute,
            batch_size=config.train.eval_batch_size or config.train.batch_size,
        )

    def bind(self, model: PreTrainedModel, method: Method, *, fresh: bool) -> PreferenceLearner:
        """The loss on this model."""
        return PreferenceLearner(
            model,
            method,
            task=self._config.task,
            options=self._config.preference,
            reference=None if self._reference.adapter is None else REFERENCE,
            begins_at_reference=fresh
            and self._reference.is_start
            and method.name not in _CHANGE_AT_ONCE,
        )


@dataclass(frozen=True, slots=True)
class _Answers:
    """Log-probabilities of the answers of a batch, each (answers,) in nats."""

    policy: Tensor
    reference: Tensor | None
    num_tokens: Tensor

    @property
    def ratio(self) -> Tensor:
        """Policy less reference."""
        if self.reference is None:
            raise ValueError("this task has no reference")
        return self.policy - self.reference


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

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """Summed over pairs or answers and divided by those of the whole step.

        Raises:
            TrainingError: the policy does not begin at the reference.
        """
        if self._to_check:
            self._check_start(inputs)
        losses = self._losses(inputs, self._answers(inputs))
        return losses.sum() / (len(losses) if num_items is None else num_items.to(losses.device))

    def validate(self, batches: Iterable[Inputs]) -> Validated:
        """Mean loss; how often, and by how much, the better answer has the higher reward."""
        losses: list[Tensor] = []
        rewards: list[Tensor] = []
        desirable: list[Tensor] = []
        wins: list[Tensor] = []
        for inputs in batches:
            answers = self._answers(inputs)
            losses.append(self._losses(inputs, answers))
            reward = self._rewards(answers)[: len(inputs["desirable"])]
            rewards.append(reward)
            desirable.append(inputs["desirable"].to(reward.device))
            if self._task != "kto":
                chosen, rejected = reward.chunk(2)
                # A tie is half a win: before the first step policy and reference are the same.
                wins.append((chosen > rejected).double() + 0.5 * (chosen == rejected).double())
        all_losses, reward, good = (
            torch.cat(losses),
            torch.cat(rewards).double(),
            torch.cat(desirable),
        )
        metrics = {"reward_margin": float(reward[good].mean() - reward[~good].mean())}
        if wins:
            metrics["reward_accuracy"] = float(torch.cat(wins).mean())
        return Validated(
            loss=float(all_losses.double().mean()), num_items=len(all_losses), metrics=metrics
        )

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
        reference = None if self._task == "orpo" else self.reference(inputs)
        num_rows = len(batch["labels"])
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum(1)
        if self._task == "kto" and torch.is_grad_enabled():
            policy = self._kto_policy(batch, num_rows)
        else:
            policy = _logps(self.label_head.logits(batch), num_rows)
        return _Answers(policy, reference, num_tokens.to(policy.device))

    def _kto_policy(self, batch: dict[str, Tensor], num_rows: int) -> Tensor:
        """The answers with gradient; the mismatched ones behind them without."""
        half = num_rows // 2
        parts = [
            {k: v[rows] for k, v in batch.items()} for rows in (slice(half), slice(half, None))
        ]
        with torch.no_grad():
            mismatched = _logps(self.label_head.logits(parts[1]), half)
        return torch.cat([_logps(self.label_head.logits(parts[0]), half), mismatched])

    def reference(self, inputs: Inputs) -> Tensor:
        """(answers,) in nats, without gradient and without dropout; known already, or computed."""
        if "reference" in inputs:
            return inputs["reference"]
        batch, model = _model_inputs(inputs), self._model
        off = self._method.disabled(model) if self._named is None else use(model, self._named)
        with torch.no_grad(), evaluating(model), off:
            return _logps(self.label_head.logits(batch), len(batch["labels"]))

    def _check_start(self, inputs: Inputs) -> None:
        """The policy must begin at the reference: distance 0, and so a DPO loss of log 2.

        Otherwise what is called the reference is another model than the one that is trained, and
        every reward is measured from the wrong place.
        """
        self._to_check = False
        batch = _model_inputs(inputs)
        with torch.no_grad(), evaluating(self._model):
            policy = _logps(self.label_head.logits(batch), len(batch["labels"]))
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum(1).to(policy.device)
        distance = float(((policy - self.reference(inputs)).abs() / num_tokens).max())
        half = torch.is_autocast_enabled(policy.device.type) or any(
            p.dtype != torch.float32 for p in self._model.parameters()
        )
        allowed = _START_TOLERANCE_HALF if half else _START_TOLERANCE
        if not distance <= allowed:
            raise TrainingError(
                "the policy does not begin at its reference",
                where=f"the first batch of task {self._task}",
                expected=f"log-probabilities that agree to {allowed:g} nats per token",
                found=format_number(distance),
                remedy="train a method that leaves the model as it was at the start",
            )


def _model_inputs(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}


def _logps(found: LabelLogits, num_rows: int) -> Tensor:
    """Log-probability of each row's answer, (num_rows,) float32 in nats."""
    return -found.row_nll(num_rows)
