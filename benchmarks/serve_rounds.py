"""What the sections of serve.py share: their time, their spread, their models."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Bench:
    """What a section is given.

    Attributes:
        until: on time.monotonic's clock; no round begins that would end later.
        counts: of registered adapters.
        requests: per queue.
        answer: tokens of the longest answer.
        reference: what the model was loaded from.
    """

    model: Any
    tokenizer: Any
    until: float
    seed: int
    counts: tuple[int, ...]
    requests: int
    answer: int
    reference: str = ""

    def rounds(self, *, at_least: int, at_most: int) -> Iterator[int]:
        """Count rounds while there is time for one as long as the longest so far."""
        longest = 0.0
        for index in range(at_most):
            start = time.monotonic()
            if index >= at_least and start + longest > self.until:
                return
            yield index
            longest = max(longest, time.monotonic() - start)

    def prompt(self, length: int, seed: int) -> list[int]:
        """Random tokens of the model's vocabulary."""
        drawn = random.Random(seed)
        width = self.model.config.get_text_config(decoder=True).vocab_size
        return [drawn.randrange(width // 20, width - width // 20) for _ in range(length)]


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, quartiles and how many there are."""
    found: dict[str, Any] = {"median": round(statistics.median(values), digits), "n": len(values)}
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        found["quartiles"] = [round(low, digits), round(high, digits)]
    return found


def ratios(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The spread of the rounds' ratios."""
    return spread([a / b for a, b in zip(times, others, strict=True)])


def percentiles(values: list[float], digits: int = 4) -> dict[str, float]:
    """p50, p95, p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else []
    cuts = cuts or [*values] * 99
    return {f"p{i}": round(cuts[i - 1], digits) for i in (50, 95, 99)}


def sharing(model: Any) -> Any:
    """A second tree of modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def pretend_learned(model: nn.Module, seed: int) -> None:
    """Move everything that is trainable a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
