"""The metrics of a classification or regression task, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.math import agreement

# Statistics of each example from (predicted, labels, number of classes), (n, k).
Statistics = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """One metric; higher is better for all of them.

    Attributes:
        about: what exactly is computed.
        statistics: one vector per example, float64 (n, k).
        score: summed statistics (..., k) to the metric (...).
    """

    about: str
    statistics: Statistics
    score: Callable[[Tensor], Tensor]

    def value(self, predicted: Tensor, labels: Tensor, num_classes: int) -> float:
        """The metric over all examples: class ids int64 (n,), or numbers (n,)."""
        return float(self.score(self.statistics(predicted, labels, num_classes).sum(0)))


def _numbers(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return agreement.number_statistics(predicted, labels)


def _ranks(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return agreement.rank_statistics(predicted, labels)


def _numbers_and_ranks(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    both = (
        agreement.number_statistics(predicted, labels),
        agreement.rank_statistics(predicted, labels),
    )
    return torch.cat(both, dim=1)


def _mean_of_accuracy_and_f1(total: Tensor) -> Tensor:
    return (agreement.accuracy(total) + agreement.f1(total)) / 2


def _mean_of_correlations(total: Tensor) -> Tensor:
    values, ranks = total.split(total.shape[-1] // 2, dim=-1)
    return (agreement.pearson(values) + agreement.pearson(ranks)) / 2


_classes = agreement.class_statistics

TASK_METRICS: dict[str, TaskMetric] = {
    "accuracy": TaskMetric("share of rows whose class is right", _classes, agreement.accuracy),
    "f1": TaskMetric("F1 of the class with id 1", _classes, agreement.f1),
    "macro_f1": TaskMetric("mean F1 of the classes", _classes, agreement.macro_f1),
    "matthews": TaskMetric(
        "Matthews correlation of classes (R_K for more than two)", _classes, agreement.matthews
    ),
    "accuracy_f1": TaskMetric("mean of accuracy and f1", _classes, _mean_of_accuracy_and_f1),
    "pearson": TaskMetric("Pearson correlation of numbers", _numbers, agreement.pearson),
    "spearman": TaskMetric(
        "Spearman rank correlation, ties at their mean rank", _ranks, agreement.pearson
    ),
    "pearson_spearman": TaskMetric(
        "mean of pearson and spearman", _numbers_and_ranks, _mean_of_correlations
    ),
}


def metrics_for(num_classes: int) -> tuple[str, ...]:
    """The metrics that are defined for a task, the usual one first.

    Args:
        num_classes: K; 0 for regression.
    """
    if num_classes == 0:
        return ("pearson", "spearman", "pearson_spearman")
    if num_classes == 2:
        return ("accuracy", "f1", "accuracy_f1", "matthews")
    return ("accuracy", "macro_f1", "matthews")


def score_all(predicted: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Every metric of the task.

    Args:
        predicted: class ids int64 (n,), or numbers (n,).
        labels: the same kind.
        num_classes: K; 0 for regression.
    """
    return {
        name: TASK_METRICS[name].value(predicted, labels, num_classes)
        for name in metrics_for(num_classes)
    }
