"""Classification of a sentence or a pair, or a number for it, by a head on the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.classification import ClassifyExamples, build_classification
from lorakit.data.classify_options import find_columns, targets_of
from lorakit.data.collate import ClassifyCollator
from lorakit.data.rows import Rows
from lorakit.data.targets import Targets, mean_number
from lorakit.errors import ConfigError
from lorakit.math.task_metrics import metrics_for, score_all
from lorakit.methods.base import Method
from lorakit.models.classify import Classifier
from lorakit.models.empty import empty_classifier
from lorakit.models.load import load_base_model, load_config
from lorakit.models.loss_share import LossShare
from lorakit.models.positions import num_positions
from lorakit.models.stored import missing_parameters
from lorakit.models.task_head import (
    ClassificationHead,
    head_modules,
    own_classes,
    padding_id,
    unstored_modules,
)
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import ExampleSet, Inputs, Validated


class ClassifyObjective:
    """Cross-entropy over classes, or the squared error of a number.

    Args:
        config: the run.
        tokenizer: of the base.
        rows: the training rows; they say what the classes are.

    Raises:
        DataError: labels that cannot be learned.
        ConfigError: options that do not fit these labels.
    """

    unit = "rows"
    rows_each = 1

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._base = load_config(config.model.ref)
        self._options = config.data.classify_options()
        self._columns = find_columns(rows, self._options)
        self.targets: Targets = targets_of(rows, self._options, known=own_classes(self._base))
        self.metrics = metrics_for(len(self.targets.names))
        self.best = self.metrics[0]
        self.head = ClassificationHead(
            names=self.targets.names,
            pad_token_id=padding_id(self._base, tokenizer),
            seed=config.seed,
            mean=mean_number(rows, self._columns.label) if self.targets.regression else 0.0,
        )
        self._collator = ClassifyCollator(
            self.head.pad_token_id, regression=self.targets.regression
        )
        if self.targets.regression and config.train.label_smoothing:
            raise ConfigError(
                "label smoothing needs classes, and the labels are numbers",
                where="train.label_smoothing",
                expected="0",
                found=f"{config.train.label_smoothing:g}",
            )

    def empty_model(self) -> PreTrainedModel:
        """The base with the head."""
        return empty_classifier(self._base, self.head)

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The base with the head, which starts from the run's seed."""
        base = self._config.model
        return load_base_model(base.ref, base.quantize, dtype=dtype, device=device, head=self.head)

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """The head, and what of the body the base's files lack."""
        if not isinstance(model, PreTrainedModel):
            return ()
        missing = missing_parameters(self._config.model.ref, model)
        return (*head_modules(model), *unstored_modules(model, missing))

    def build(self, rows: Rows, *, label: str) -> ClassifyExamples:
        """See `lorakit.data.classification.build_classification`."""
        return build_classification(
            rows,
            self._tokenizer,
            self._options,
            self.targets,
            context=num_positions(self.empty_model()),
            label=label,
        )

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """See `lorakit.data.collate.ClassifyCollator`."""
        return self._collator(examples)

    def num_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The rows."""
        return torch.tensor(len(batch["labels"]))

    def most_labels(self, examples: ExampleSet, num_rows: int) -> int:
        """None: there are no logits over the vocabulary."""
        return 0

    def line(self, examples: ExampleSet) -> str:
        """The classes with their rows, or the mean of the numbers; what was decided for them."""
        report = cast(ClassifyExamples, examples).report
        what = f"{len(report.class_counts)} classes: " + ", ".join(
            f"{name} {count:,}" for name, count in report.class_counts.items()
        )
        if self.targets.regression:
            what = f"regression, mean {report.label_mean:.4g}"
        columns = " + ".join(n for n in (self._columns.text, self._columns.text_pair) if n)
        notes = "; ".join(self.targets.notes)
        told = f"{columns} -> {self._columns.label}, {what}"
        return f"{told} ({notes})" if notes else told

    def facts(self) -> dict[str, Any]:
        """Classes, columns and limits: what a reader needs to use the head."""
        columns = {"text": self._columns.text, "label": self._columns.label}
        if self._columns.text_pair is not None:
            columns["text_pair"] = self._columns.text_pair
        return {
            "task": {
                "name": "classify",
                "targets": self.targets.to_json(),
                "columns": columns,
                "max_length": self._options.max_length,
                "pad_token_id": self.head.pad_token_id,
            }
        }

    def with_model(
        self, examples: ExampleSet, model: PreTrainedModel, method: Method, facts: dict[str, Any]
    ) -> ExampleSet:
        """The examples as they are."""
        return examples

    def bind(self, model: PreTrainedModel, method: Method, *, fresh: bool) -> ClassifyLearner:
        """The loss on this model."""
        return self.learner(model)

    def learner(self, model: PreTrainedModel) -> ClassifyLearner:
        """The loss and the predictions of this model."""
        return ClassifyLearner(model, self.targets)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a classifier says of rows.

    Attributes:
        total_loss: summed over the rows.
        predicted: class ids int64 (n,), or numbers float32 (n,); on the CPU.
        labels: the same kind, in the same order.
    """

    total_loss: float
    predicted: Tensor
    labels: Tensor


class ClassifyLearner:
    """The loss of a classifier, and its metrics as GLUE defines them."""

    def __init__(self, model: PreTrainedModel, targets: Targets) -> None:
        self._targets = targets
        self._classifier = Classifier(model, regression=targets.regression)

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """Summed over the rows and divided by those of the whole step."""
        outputs = self._classifier.outputs(inputs)
        total = self._classifier.total_loss(outputs, inputs["labels"], label_smoothing)
        return total / (len(inputs["labels"]) if num_items is None else num_items.to(total.device))

    def losses(self, inputs: Inputs, shares: Sequence[LossShare]) -> list[Tensor]:
        """`loss` of the rows of each share, from one forward pass."""
        outputs = self._classifier.outputs(inputs)
        sizes = [share.num_rows for share in shares]
        parts = zip(shares, outputs.split(sizes), inputs["labels"].split(sizes), strict=True)
        return [
            self._classifier.total_loss(part, labels, share.label_smoothing)
            / (share.num_rows if share.num_items is None else share.num_items)
            for share, part, labels in parts
        ]

    def noted(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def observe(self, batches: Iterable[Inputs]) -> Predictions | None:
        """See `predict`; None where there are no batches."""
        rest = iter(batches)
        first = next(rest, None)
        return None if first is None else self.predict(chain([first], rest))

    def conclude(self, observed: Sequence[Predictions | None]) -> Validated:
        """Mean loss per row, and every metric of the task over all rows."""
        found = [some for some in observed if some is not None]
        predicted = torch.cat([some.predicted for some in found])
        labels = torch.cat([some.labels for some in found])
        return Validated(
            loss=sum(some.total_loss for some in found) / len(labels),
            num_items=len(labels),
            metrics=score_all(predicted, labels, len(self._targets.names)),
        )

    def predict(self, batches: Iterable[Inputs]) -> Predictions:
        """Prediction and label of every row; called in eval mode and without gradient."""
        total = 0.0
        predicted: list[Tensor] = []
        labels: list[Tensor] = []
        for inputs in batches:
            outputs = self._classifier.outputs(inputs)
            total += float(self._classifier.total_loss(outputs, inputs["labels"]).double())
            predicted.append(self._classifier.predictions(outputs).cpu())
            labels.append(inputs["labels"].cpu())
        return Predictions(total, torch.cat(predicted), torch.cat(labels))
