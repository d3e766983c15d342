"""How sure a number is: intervals and p-values over the examples of an evaluation.

A metric is kept as one small vector of statistics per example and a function that turns the sum of
these vectors into the metric: (score, 1) for a mean, (nll, tokens) for perplexity, n-gram counts
for BLEU. Resampling examples is then a matrix product, exact also for corpus metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import DataError

Floats = NDArray[np.float64]

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
_Z = 1.959963984540054  # the 0.975 quantile of the normal distribution
_ELEMENTS_AT_ONCE = 4_000_000
_TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number with its 95 % interval over `n` examples."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON values."""
        return {"value": self.value, "interval": [self.low, self.high], "n": self.n}


@dataclass(frozen=True, slots=True)
class Difference:
    """What one system scores above another on the same examples, and how likely by chance."""

    estimate: Estimate
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """The difference as plain JSON values."""
        return {**self.estimate.to_json(), "p_value": self.p_value}


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric over the examples of one system.

    Attributes:
        statistics: (n, k), one vector per example.
        score: maps summed statistics (..., k) to the metric (...).
        binary: each example is right (1) or wrong (0), so the metric is a proportion.
    """

    statistics: Floats
    score: Callable[[Floats], Floats]
    binary: bool = False

    @classmethod
    def mean_of(cls, scores: Sequence[float] | Floats) -> Sample:
        """The mean of one score per example; a proportion if every score is 0 or 1."""
        values = np.asarray(scores, dtype=np.float64)
        statistics = np.stack([values, np.ones_like(values)], axis=1)
        return cls(statistics, _ratio, binary=bool(np.isin(values, (0.0, 1.0)).all()))

    def value(self) -> float:
        """The metric over all examples."""
        return float(self.score(self.statistics.sum(axis=0)))


def _ratio(total: Floats) -> Floats:
    return total[..., 0] / total[..., 1]


def wilson(successes: float, n: int) -> Estimate:
    """The proportion successes/n with Wilson's score interval (Wilson 1927).

    It has a width also at 0/n and n/n, where a bootstrap has none.

    Raises:
        DataError: n is 0.
    """
    _require_examples(n)
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At the ends the formula reaches 0 and 1 up to rounding: do not leave the range.
    return Estimate(
        share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n
    )


def bootstrap(
    scores: Sequence[float] | Floats, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """The mean of the scores with its percentile bootstrap interval over examples.

    Raises:
        DataError: there are no scores.
    """
    return _bootstrap(Sample.mean_of(scores), seed, num_resamples)


def estimate(sample: Sample, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """The metric with its 95 % interval: Wilson's for proportions, percentile bootstrap otherwise.

    Raises:
        DataError: the sample has no examples.
    """
    n = len(sample.statistics)
    _require_examples(n)
    if sample.binary:
        return wilson(float(sample.statistics[:, 0].sum()), n)
    return _bootstrap(sample, seed, num_resamples)


def paired_p_value(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> float:
    """Two-sided p-value of the difference of two means on the same examples.

    See `difference`, which tests any metric.
    """
    return _swap_p_value(Sample.mean_of(a), Sample.mean_of(b), seed, num_resamples)


def difference(
    a: Sample, b: Sample, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Difference:
    """The metric of `b` minus that of `a`, on the same examples in the same order.

    The interval is Newcombe's for two proportions (1998, method 10), which has a width also where
    one system is right everywhere; otherwise the paired bootstrap's (both systems are resampled
    together). The p-value is that of a permutation test: under the null hypothesis the two answers
    to an example may be swapped. All 2^n swaps are tried if they are no more than `num_resamples`,
    else as many random ones, counted with add-one, so that p is never 0. Equal systems have p = 1.

    Raises:
        DataError: there are no examples, or not the same number.
    """
    n = len(a.statistics)
    _require_examples(n)
    _require_paired(a, b)
    p_value = _swap_p_value(a, b, seed, num_resamples)
    value = b.value() - a.value()
    if a.binary and b.binary:
        low, high = _newcombe(a.statistics[:, 0], b.statistics[:, 0])
    else:
        draws = [
            b.score(weights @ b.statistics) - a.score(weights @ a.statistics)
            for weights in _resamples(n, seed, num_resamples)
        ]
        low, high = _percentiles(np.concatenate(draws))
    return Difference(Estimate(value, min(low, value), max(high, value), n), p_value)


def _bootstrap(sample: Sample, seed: int, num_resamples: int) -> Estimate:
    n = len(sample.statistics)
    _require_examples(n)
    draws = [
        sample.score(weights @ sample.statistics) for weights in _resamples(n, seed, num_resamples)
    ]
    low, high = _percentiles(np.concatenate(draws))
    return Estimate(sample.value(), low, high, n)


def _resamples(n: int, seed: int, num_resamples: int) -> Iterator[Floats]:
    """How often each example is drawn, (some, n), until there are `num_resamples` rows."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS_AT_ONCE // n)
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        yield generator.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)


def _percentiles(draws: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _swap_p_value(a: Sample, b: Sample, seed: int, num_resamples: int) -> float:
    n = len(a.statistics)
    _require_examples(n)
    _require_paired(a, b)
    observed = abs(b.value() - a.value())
    total = a.statistics.sum(axis=0) + b.statistics.sum(axis=0)
    # Ties with the observed difference count as extreme; rounding must not lose them.
    threshold = observed - _TIE * max(1.0, observed)
    num_extreme = num_tried = 0
    exact = 2**n <= num_resamples
    for swaps in _all_swaps(n) if exact else _random_swaps(n, seed, num_resamples):
        first = a.statistics.sum(axis=0) + swaps @ (b.statistics - a.statistics)
        distance = np.abs(b.score(total - first) - a.score(first))
        num_extreme += int((distance >= threshold).sum())
        num_tried += len(swaps)
    return num_extreme / num_tried if exact else (num_extreme + 1) / (num_tried + 1)


def _all_swaps(n: int) -> Iterator[Floats]:
    yield _swap_table(n)


@lru_cache(maxsize=4)
def _swap_table(n: int) -> Floats:
    return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)


def _random_swaps(n: int, seed: int, num_resamples: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS_AT_ONCE // n)
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        yield generator.integers(0, 2, size=(size, n)).astype(np.float64)


def _newcombe(a: Floats, b: Floats) -> tuple[float, float]:
    """The 95 % interval of mean(b) - mean(a) for paired 0/1 scores, Newcombe 1998, method 10."""
    n = len(a)
    first, second = wilson(a.sum(), n), wilson(b.sum(), n)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float(a.sum() - both), float(b.sum() - both)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    phi = cross / math.sqrt(margins) if margins > 0 else 0.0
    below = _combine(second.value - second.low, first.high - first.value, phi)
    above = _combine(second.high - second.value, first.value - first.low, phi)
    value = second.value - first.value
    return max(-1.0, value - below), min(1.0, value + above)


def _combine(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _require_examples(n: int) -> None:
    if n == 0:
        raise DataError(
            "there are no examples to score",
            expected="at least one row",
            remedy="check the data file, its split and the limit",
        )


def _require_paired(a: Sample, b: Sample) -> None:
    if len(a.statistics) != len(b.statistics):
        raise DataError(
            "two systems were not scored on the same examples",
            expected=f"{len(a.statistics)} scores",
            found=f"{len(b.statistics)}",
        )
