"""The time of one forward pass beside the base's, in one run and alternating."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.compare.trained import load_cell_base, load_trained, objective_of
from lorakit.errors import MergeError
from lorakit.models.positions import num_positions
from lorakit.train.config import TrainConfig

_WARM_UP = 3
_SEED = 0


def measure_latency(
    config: TrainConfig, weights: Path, *, trials: int, batch_size: int, length: int
) -> dict[str, Any]:
    """How long a forward pass takes with the method, unmerged and merged, beside the base.

    Base and method alternate pass by pass, so that what slows the machine slows both; the ratio is
    the median over the pairs, its spread their quartiles.

    Args:
        config: the run.
        weights: what it saved.
        trials: pairs of passes.
        batch_size: rows in a pass.
        length: tokens in a row; no more than the model's positions.

    Returns:
        "unmerged" and "merged", each {"ratio", "quartiles", "base_ms", "ms"}; merged is
        {"refused": the reason} where the method cannot be merged.
    """
    objective = objective_of(config)
    base = load_cell_base(config, weights, objective)
    model, method = load_trained(config, weights, objective)
    positions = num_positions(base)
    length = length if positions is None else min(length, positions)
    ids = _token_ids(base, batch_size, length)
    found: dict[str, Any] = {"trials": trials, "batch_size": batch_size, "length": length}
    found["unmerged"] = compare_times(lambda: _pass(base, ids), lambda: _pass(model, ids), trials)
    try:
        method.merge(model)
    except MergeError as error:
        found["merged"] = {"refused": error.what}
    else:
        found["merged"] = compare_times(lambda: _pass(base, ids), lambda: _pass(model, ids), trials)
    return found


def compare_times(
    first: Callable[[], object], second: Callable[[], object], trials: int
) -> dict[str, Any]:
    """Times of two calls in turn; the ratio of the second to the first."""
    for _ in range(_WARM_UP):
        first()
        second()
    times = np.empty((trials, 2))
    for trial in range(trials):
        # The one that comes first in a pair changes: neither always finds the other's cache.
        order = ((0, first), (1, second))
        for place, call in order if trial % 2 == 0 else reversed(order):
            started = time.perf_counter()
            call()
            times[trial, place] = time.perf_counter() - started
    ratios = times[:, 1] / times[:, 0]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return {
        "ratio": float(np.median(ratios)),
        "quartiles": [float(low), float(high)],
        "base_ms": float(1e3 * np.median(times[:, 0])),
        "ms": float(1e3 * np.median(times[:, 1])),
    }


def _token_ids(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    embeddings = model.get_input_embeddings()
    vocabulary = next(embeddings.parameters()).shape[0]
    drawn = torch.randint(
        vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(_SEED)
    )
    return drawn.to(model.device)


def _pass(model: PreTrainedModel, ids: Tensor) -> None:
    with torch.inference_mode():
        model(input_ids=ids)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
