"""The final score of a cell: metric name -> estimate, in plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorakit.compare.classify_scores import Scores, score_classifier
from lorakit.compare.config import LOSS
from lorakit.compare.trained import adapter_of, load_trained
from lorakit.data.options import SftOptions
from lorakit.data.sources import load_rows
from lorakit.evaluate.intervals import Estimate
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.run import evaluate
from lorakit.models.load import load_tokenizer
from lorakit.train.config import TrainConfig

_SYSTEM = "trained"


def validation_score(run: Mapping[str, Any]) -> Scores:
    """The validation loss of a run as its score."""
    found = run["metrics"]["final"]["eval_loss"]
    return {LOSS: {"value": found, "interval": None, "n": None, "higher_is_better": False}}


def score_rows(
    config: TrainConfig, weights: Path, source: tuple[str, str | None], options: Mapping[str, Any]
) -> Scores:
    """Score saved weights on a data file, read back from the disk.

    Args:
        config: the run that saved them.
        weights: their directory.
        source: the data and which split of it.
        options: metrics, limit, max_new_tokens and batch_size.

    Raises:
        RequestError: rows or metrics that do not fit the task.
    """
    if config.task == "classify":
        return score_classifier(config, weights, source, options)
    model, method = load_trained(config, weights)
    wanted = [str(metric) for metric in options["metrics"]] or [LOSS]
    found = evaluate(
        model,
        load_tokenizer(config.model.ref),
        load_rows(source[0], split=source[1]),
        eval_options(config, wanted, options),
        systems={_SYSTEM: adapter_of(method)},
    )
    estimates = found.systems[_SYSTEM].scores
    return {name: _plain(name, estimates[_asked(name)]) for name in wanted}


def eval_options(
    config: TrainConfig, metrics: list[str], options: Mapping[str, Any]
) -> EvalOptions:
    """The options of `lorakit eval` for these rows, which are rendered as in training.

    Raises:
        ConfigError: an unknown metric.
    """
    rendering = {field.name: getattr(config.data, field.name) for field in fields(SftOptions)}
    return EvalOptions(
        metrics=tuple(dict.fromkeys(_asked(name) for name in metrics)),
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        limit=options["limit"],
        sft=SftOptions(**rendering),
    )


def _asked(metric: str) -> str:
    return "perplexity" if metric == LOSS else metric


def _plain(metric: str, estimate: Estimate) -> dict[str, Any]:
    plain = estimate.to_json()
    if metric == LOSS:
        plain["value"] = math.log(plain["value"])
        plain["interval"] = [math.log(bound) for bound in plain["interval"]]
    return {**plain, "higher_is_better": METRICS[_asked(metric)].higher_is_better}
