"""Preference tuning: DPO and IPO, ORPO, KTO. What is learned by them; the loss is the learner's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.adapters.bind import bind_adapter, plan_binding
from lorakit.data.collate import PreferenceCollator
from lorakit.data.preference import Judged, PreferenceExamples, build_preferences
from lorakit.data.rows import Rows
from lorakit.methods.base import Method
from lorakit.models.causal import require_causal
from lorakit.models.empty import empty_model
from lorakit.train.beginning import BASE, read_reference
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import LOSS, ExampleSet
from lorakit.train.objectives.base_model import load_to_pack
from lorakit.train.objectives.preference_learner import PreferenceLearner
from lorakit.train.reference_cache import cached_reference

# A prefix changes the model at once, so its policy does not begin at the reference.
_CHANGE_AT_ONCE = ("prefix_embedding", "prefix_layer")
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
    rows_each = 1

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
        require_causal(base)
        if self._reference.adapter is not None:
            plan_binding(base, self._reference.adapter)
        return base

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The base, ready to be packed, with the adapter attached that is the reference."""
        model = load_to_pack(self._config.model, dtype, device)
        if self._reference.adapter is not None:
            bind_adapter(model, self._reference.adapter, REFERENCE)
        return model

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """Nothing: the base has its head."""
        return ()

    def build(self, rows: Rows, *, label: str) -> PreferenceExamples:
        """See `lorakit.data.preference.build_preferences`."""
        return build_preferences(
            rows,
            self._tokenizer,
            self._config.data,
            paired=self._paired,
            desirable_from=self._config.preference.desirable_from,
            label=label,
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
        return "; ".join((told, *against))

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
