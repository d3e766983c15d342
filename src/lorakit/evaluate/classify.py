"""Measure a classifier on rows with labels, beside the best constant answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.classification import ClassifyExamples, build_classification
from lorakit.data.classify_options import ClassifyOptions
from lorakit.data.collate import ClassifyCollator
from lorakit.data.rows import Rows
from lorakit.data.targets import Targets
from lorakit.data.task_facts import ClassifyTask
from lorakit.errors import ConfigError, DataError, nearest
from lorakit.evaluate.intervals import Difference, Estimate, Floats, Sample, difference, estimate
from lorakit.math.task_metrics import TASK_METRICS, metrics_for
from lorakit.models.classify import Classifier
from lorakit.models.label_head import evaluating
from lorakit.models.positions import num_positions
from lorakit.progress import progress

SYSTEM = "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyEvalOptions:
    """What to measure of a classifier, and how.

    Args:
        metrics: names; empty for all that the task has.
        columns: role -> column where it is not the one of the training rows.
        batch_size: rows per forward pass.
        limit: only the first so many rows; None for all.
        seed: of the resampling.

    Raises:
        ConfigError: a value out of range.
    """

    metrics: tuple[str, ...] = ()
    columns: Mapping[str, str] | None = None
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is out of range", where=name, expected="at least 1", found=str(value)
                )


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: how many rows have it, how many were given it, and how many rightly."""

    name: str
    count: int
    predicted: int
    hits: int

    @property
    def precision(self) -> float | None:
        """Hits per prediction; None where the class was never predicted."""
        return self.hits / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Hits per row of the class; None where no row has it."""
        return self.hits / self.count if self.count else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "count": self.count,
            "predicted": self.predicted,
            "precision": self.precision,
            "recall": self.recall,
        }


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """What was measured of a classifier.

    Attributes:
        baseline: what it is compared with: the majority class, or the mean of the labels.
        constant: that class's name, or that mean.
        scores: "majority class" or "mean", and "adapter": metric -> estimate.
        differences: metric -> adapter minus baseline; empty for regression.
        classes: one entry per class; empty for regression.
        predictions: one entry per row, in order.
        notes: what was decided for the rows.
        seconds: wall time of the forward passes.
    """

    baseline: str
    constant: str | float
    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, Difference]
    classes: list[ClassScore]
    predictions: list[dict[str, Any]]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, predictions left out."""
        metrics = self.scores[SYSTEM]
        differences = {name: found.to_json() for name, found in self.differences.items()}
        return {
            "task": "classify",
            "num_rows": len(self.predictions),
            "metrics": {
                name: {"about": TASK_METRICS[name].about, "higher_is_better": True}
                for name in metrics
            },
            "baseline": self.baseline,
            "constant": self.constant,
            "systems": {
                system: {"scores": {name: found.to_json() for name, found in scores.items()}}
                for system, scores in self.scores.items()
            },
            "differences": {SYSTEM: differences} if differences else {},
            "classes": [found.to_json() for found in self.classes],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def evaluate_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    task: ClassifyTask,
    options: ClassifyEvalOptions,
) -> ClassifyResult:
    """Score a classifier with the metrics of its task, as GLUE defines them.

    A base has no trained head, so the comparison is with the best constant answer: the most
    frequent class of these rows, or the mean of their labels. All rows are read and checked before
    the model runs. The model is left as it was.

    Args:
        model: with the task's head and what was learned.
        tokenizer: its tokenizer.
        rows: with texts and labels.
        task: what it was trained on.
        options: what to measure.

    Raises:
        DataError: no rows, a row without text, a label that is none of the classes.
        ConfigError: a metric that the task does not have.
    """
    names = chosen_metrics(task, options.metrics)
    if not len(rows):
        raise DataError("the data is empty", where=rows.source, expected="at least one row")
    rows = rows[: options.limit] if options.limit is not None else rows
    columns = {**task.columns, **(options.columns or {})}
    examples = build_classification(
        rows,
        tokenizer,
        ClassifyOptions(columns=columns, max_length=task.max_length),
        task.targets,
        context=num_positions(model),
    )
    started = time.monotonic()
    outputs = _outputs(model, examples, task, options.batch_size)
    seconds = time.monotonic() - started
    predicted = outputs if task.targets.regression else outputs.argmax(-1)
    dtype = torch.float64 if task.targets.regression else torch.long
    labels = torch.tensor([example.label for example in examples], dtype=dtype)
    baseline, constant = _constant(labels, task.targets)
    num_classes = len(task.targets.names)
    samples = {
        baseline: {n: metric_sample(n, constant, labels, num_classes) for n in names},
        SYSTEM: {n: metric_sample(n, predicted, labels, num_classes) for n in names},
    }
    compared = () if task.targets.regression else names
    value = float(constant[0])
    return ClassifyResult(
        baseline=baseline,
        constant=value if task.targets.regression else task.targets.names[int(value)],
        scores={
            system: {n: estimate(sample, seed=options.seed) for n, sample in found.items()}
            for system, found in samples.items()
        },
        differences={
            n: difference(samples[baseline][n], samples[SYSTEM][n], seed=options.seed)
            for n in compared
        },
        classes=_class_scores(predicted, labels, task.targets),
        predictions=_predictions(rows, examples, outputs, task.targets),
        notes=examples.report.notes,
        seconds=seconds,
    )


def chosen_metrics(task: ClassifyTask, wanted: Sequence[str]) -> tuple[str, ...]:
    """The metrics that were asked for, all of the task's by default.

    Raises:
        ConfigError: one that is not defined for this task.
    """
    there = metrics_for(len(task.targets.names))
    for name in wanted:
        if name not in there:
            close = nearest(name, there, n=1)
            what = (
                "a regression" if task.targets.regression else f"{len(task.targets.names)} classes"
            )
            raise ConfigError(
                f"the metric {name!r} is not one of {what}",
                where="metrics",
                expected=", ".join(there),
                remedy=f"did you mean {close[0]!r}?" if close else "leave it out for all of them",
            )
    return tuple(dict.fromkeys(wanted)) or there


@torch.inference_mode()
def _outputs(
    model: PreTrainedModel, examples: ClassifyExamples, task: ClassifyTask, batch_size: int
) -> Tensor:
    """Probabilities (n, classes) or numbers (n,), float64 on the CPU, in the examples' order."""
    regression = task.targets.regression
    classifier = Classifier(model, regression=regression)
    collate = ClassifyCollator(task.pad_token_id, regression=regression)
    lengths = examples.lengths
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    shape = (len(examples),) if regression else (len(examples), len(task.targets.names))
    found = torch.zeros(shape, dtype=torch.float64)
    with progress("classifying", len(order)) as bar, evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen])
            outputs = classifier.outputs({k: v.to(model.device) for k, v in batch.items()})
            outputs = outputs if regression else outputs.softmax(-1)
            found[chosen] = outputs.double().cpu()
            bar.advance(len(chosen))
    return found


def _constant(labels: Tensor, targets: Targets) -> tuple[str, Tensor]:
    if targets.regression:
        return "mean", torch.full_like(labels, float(labels.mean()))
    majority = int(torch.bincount(labels, minlength=len(targets.names)).argmax())
    return "majority class", torch.full_like(labels, majority)


def metric_sample(name: str, predicted: Tensor, labels: Tensor, num_classes: int) -> Sample:
    """What a metric of a task is computed from, for an interval.

    Args:
        name: a key of TASK_METRICS.
        predicted: (n,) class numbers, or numbers.
        labels: (n,) likewise.
        num_classes: 0 for numbers.
    """
    if name == "accuracy":
        # As a proportion it has an interval also where every row is right.
        return Sample.mean_of((predicted == labels).double().numpy())
    metric = TASK_METRICS[name]
    statistics = metric.statistics(predicted, labels, num_classes)
    return Sample(statistics.numpy(), _on_arrays(metric.score))


def _on_arrays(score: Callable[[Tensor], Tensor]) -> Callable[[Floats], Floats]:
    return lambda total: score(torch.from_numpy(total)).numpy()


def _class_scores(predicted: Tensor, labels: Tensor, targets: Targets) -> list[ClassScore]:
    return [
        ClassScore(
            name=name,
            count=int((labels == i).sum()),
            predicted=int((predicted == i).sum()),
            hits=int(((labels == i) & (predicted == i)).sum()),
        )
        for i, name in enumerate(targets.names)
    ]


def _predictions(
    rows: Rows, examples: ClassifyExamples, outputs: Tensor, targets: Targets
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for example, output in zip(examples, outputs, strict=True):
        origin = rows.origin(example.row)
        if targets.regression:
            found.append(
                {"origin": str(origin), "label": example.label, "predicted": output.item()}
            )
            continue
        probabilities = dict(zip(targets.names, output.tolist(), strict=True))
        label, said = targets.names[int(example.label)], targets.names[int(output.argmax())]
        found.append(
            {
                "origin": str(origin),
                "label": label,
                "predicted": said,
                "right": label == said,
                "probabilities": probabilities,
            }
        )
    return found
