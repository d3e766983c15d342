"""Supervised fine-tuning: the next token, where the rows say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.collate import Collator
from lorakit.data.encode import IGNORED
from lorakit.data.rows import Rows
from lorakit.data.sft import Examples, build_examples
from lorakit.methods.base import Method
from lorakit.models.causal import require_causal
from lorakit.models.empty import empty_model
from lorakit.models.label_head import LabelHead
from lorakit.models.loss_share import LossShare
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import LOSS, ExampleSet, Inputs, Validated
from lorakit.train.objectives.base_model import load_to_pack


class SftObjective:
    """Cross-entropy at the labels.

    Args:
        config: the run.
        tokenizer: of the base.
    """

    metrics: tuple[str, ...] = ()
    best = LOSS
    unit = "tokens"
    rows_each = 1

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        pad = tokenizer.pad_token_id
        self._collator = Collator(pad_token_id=pad if isinstance(pad, int) else 0)

    def empty_model(self) -> PreTrainedModel:
        """The base as it is."""
        base = empty_model(self._config.model.ref)
        require_causal(base)
        return base

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The base as it is; on a CPU with the attention that lets batches be packed."""
        return load_to_pack(self._config.model, dtype, device)

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """Nothing: the base has its head."""
        return ()

    def build(self, rows: Rows, *, label: str) -> Examples:
        """See `lorakit.data.sft.build_examples`."""
        return build_examples(rows, self._tokenizer, self._config.data, label=label)

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """See `lorakit.data.collate.Collator`."""
        return self._collator(examples)

    def num_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labels; one at position 0 is nobody's target, since the models shift by one."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def most_labels(self, examples: ExampleSet, num_rows: int) -> int:
        """The labels of the rows that have most."""
        learned = sorted((e.num_learned for e in cast(Examples, examples)), reverse=True)
        return sum(learned[:num_rows])

    def line(self, examples: ExampleSet) -> str:
        """Tokens, and how many are learned."""
        report = cast(Examples, examples).report
        return f"{report.num_tokens:,} tokens, {report.num_learned_tokens:,} of them learned"

    def facts(self) -> dict[str, Any]:
        """Nothing: an adapter without a task answers."""
        return {}

    def with_model(
        self, examples: ExampleSet, model: PreTrainedModel, method: Method, facts: dict[str, Any]
    ) -> ExampleSet:
        """The examples as they are."""
        return examples

    def bind(self, model: PreTrainedModel, method: Method, *, fresh: bool) -> SftLearner:
        """The loss on this model."""
        return SftLearner(model)


class SftLearner:
    """The loss of a language model at its labels; see `lorakit.models.label_head`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.label_head = LabelHead(model)

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """Cross-entropy, summed over the labels and divided by those of the whole step."""
        return self.label_head.loss(inputs, num_items=num_items, label_smoothing=label_smoothing)

    def losses(self, inputs: Inputs, shares: Sequence[LossShare]) -> list[Tensor]:
        """See `lorakit.models.label_head.LabelHead.losses`."""
        return self.label_head.losses(inputs, shares)

    def noted(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def observe(self, batches: Iterable[Inputs]) -> tuple[float, int]:
        """The summed cross-entropy, and the labels."""
        total, num_labels = 0.0, 0
        for inputs in batches:
            found = self.label_head.logits(inputs)
            total += float(found.nll().double().sum())
            num_labels += found.targets.numel()
        return total, num_labels

    def conclude(self, observed: Sequence[tuple[float, int]]) -> Validated:
        """Mean cross-entropy per label."""
        num_labels = sum(labels for _, labels in observed)
        total = sum(nll for nll, _ in observed)
        return Validated(loss=total / max(num_labels, 1), num_items=num_labels)
