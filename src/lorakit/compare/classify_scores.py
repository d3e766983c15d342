"""The final score of a classifier: the task's metrics on rows, with intervals over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.compare.config import LOSS
from lorakit.compare.trained import load_trained
from lorakit.data.classification import ClassifyExamples
from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError
from lorakit.evaluate.classify import metric_sample
from lorakit.evaluate.intervals import estimate
from lorakit.models.load import load_tokenizer
from lorakit.train.config import TrainConfig
from lorakit.train.loaders import validation_batches
from lorakit.train.objectives.classify import ClassifyObjective, Predictions
from lorakit.train.prepare import read_rows

Source = tuple[str, str | None]
Scores = dict[str, dict[str, Any]]


def score_classifier(
    config: TrainConfig, weights: Path, source: Source, options: Mapping[str, Any]
) -> Scores:
    """Score a saved classifier on a data file, read back from the disk.

    Args:
        config: the run that saved it.
        weights: its directory.
        source: the data and which split of it.
        options: metrics, limit and batch_size.

    Raises:
        RequestError: rows or metrics that do not fit the task.
    """
    objective, examples = _examples(config, source, options["limit"])
    wanted = _wanted(objective, options["metrics"])
    model, _ = load_trained(config, weights, objective)
    batches = (
        {name: tensor.to(model.device) for name, tensor in batch.items()}
        for batch in validation_batches(examples, objective.collate, options["batch_size"])
    )
    with torch.inference_mode():
        found = objective.learner(model).predict(batches)
    return {name: _score(name, found, len(objective.targets.names)) for name in wanted}


def require_scores(
    config: TrainConfig, source: Source | None, metrics: Sequence[str], limit: int | None
) -> None:
    """Refuse metrics that these labels do not have, and rows that cannot be scored.

    Args:
        config: a run of the comparison.
        source: the rows of the final score, or None.
        metrics: what is asked for.
        limit: only the first so many rows.

    Raises:
        ConfigError: a metric of another kind of labels.
        DataError: a row that does not fit the task.
    """
    if config.task != "classify" or source is None:
        return
    objective, _ = _examples(config, source, limit)
    _wanted(objective, metrics)


def _examples(
    config: TrainConfig, source: Source, limit: int | None
) -> tuple[ClassifyObjective, ClassifyExamples]:
    tokenizer = load_tokenizer(config.model.ref)
    objective = ClassifyObjective(config, tokenizer, read_rows(config)[0])
    rows: Rows = load_rows(source[0], split=source[1])
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    return objective, objective.build(rows, label="tokenising the rows to score")


def _wanted(objective: ClassifyObjective, metrics: Sequence[str]) -> list[str]:
    """The metrics that are asked for, else the task's usual one."""
    known = (*objective.metrics, LOSS)
    for metric in metrics:
        if metric not in known:
            kind = "numbers" if objective.targets.regression else "classes"
            raise ConfigError(
                f"{metric} is not defined for these labels",
                where="eval.metrics",
                expected=", ".join(known),
                found=f"{metric}, and the labels are {kind}: {objective.targets.to_json()}",
            )
    return list(metrics) or [known[0]]


def _score(metric: str, found: Predictions, num_classes: int) -> dict[str, Any]:
    if metric == LOSS:
        n = len(found.labels)
        loss = found.total_loss / n
        return {"value": loss, "interval": None, "n": n, "higher_is_better": False}
    sample = metric_sample(metric, found.predicted, found.labels, num_classes)
    plain = estimate(sample).to_json()
    return {**plain, "higher_is_better": True}
