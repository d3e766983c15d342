from __future__ import annotations

import json

import numpy as np
import pytest

from lorakit.errors import DataError
from lorakit.evaluate.intervals import (
    Estimate,
    Sample,
    bootstrap,
    difference,
    estimate,
    paired_p_value,
    wilson,
)
from lorakit.evaluate.metrics import bleu_of, bleu_statistics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_json_of_an_estimate() -> None:
    text = json.dumps(Estimate(0.83, 0.77, 0.88, 160).to_json())
    assert text == '{"value": 0.83, "interval": [0.77, 0.88], "n": 160}'


def test_wilson_has_the_published_values() -> None:
    # Newcombe 1998 (single proportion), table I: 81/263 and 15/148.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        found = wilson(successes, n)
        assert found.value == successes / n
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 160])
def test_an_accuracy_at_the_end_of_its_range_keeps_a_width(n: int) -> None:
    none, every = estimate(Sample.mean_of([0.0] * n)), estimate(Sample.mean_of([1.0] * n))
    assert none.value == none.low == 0.0 < none.high < 1.0
    assert every.value == every.high == 1.0 > every.low > 0.0


def test_bootstrap_interval_is_that_of_the_mean(rng: np.random.Generator) -> None:
    scores = rng.normal(3.0, 2.0, size=400)
    found = bootstrap(scores, seed=1)
    error = 1.96 * scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - error, abs=0.04)
    assert found.high == pytest.approx(scores.mean() + error, abs=0.04)
    assert found == bootstrap(scores, seed=1)
    assert found != bootstrap(scores, seed=2)


def test_coverage_is_about_95_percent(rng: np.random.Generator) -> None:
    hits = sum(
        (found := bootstrap(rng.exponential(1.0, size=80), seed=i, num_resamples=500)).low
        <= 1.0
        <= found.high
        for i in range(200)
    )
    assert 176 <= hits <= 199


def test_a_ratio_is_resampled_as_a_ratio(rng: np.random.Generator) -> None:
    tokens = rng.integers(1, 50, size=60).astype(float)
    nll = 2.0 * tokens + rng.normal(0, 1, size=60)
    sample = Sample(np.stack([nll, tokens], 1), lambda total: np.exp(total[..., 0] / total[..., 1]))
    found = estimate(sample)
    assert found.value == pytest.approx(np.exp(nll.sum() / tokens.sum()))
    assert found.low < found.value < found.high


def test_large_samples_are_resampled_in_parts(rng: np.random.Generator) -> None:
    scores = rng.random(5000)
    found = bootstrap(scores)
    assert found.high - found.low == pytest.approx(2 * 1.96 * scores.std() / 5000**0.5, rel=0.1)


def test_small_samples_are_tested_exactly() -> None:
    # All six differences point one way: 2 of 2^6 sign patterns are as extreme.
    assert paired_p_value([0, 0, 0, 0, 0, 0], [1, 2, 1, 3, 1, 2]) == 2 / 64
    assert paired_p_value([1, 2, 1, 3, 1, 2], [0, 0, 0, 0, 0, 0]) == 2 / 64
    assert paired_p_value([0.1] * 5, [0.1] * 5) == 1.0
    # One discordant pair says nothing, whichever way it points.
    assert paired_p_value([0, 1, 1], [1, 1, 1]) == 1.0


def test_the_p_value_is_never_zero_and_ties_count() -> None:
    n = 300
    strong = paired_p_value(np.zeros(n), np.ones(n), num_resamples=2000)
    assert strong == 1 / 2001
    assert paired_p_value(np.ones(n) / 3, np.ones(n) / 3) == 1.0
    # Ten against ten discordant pairs: a difference of 0, as extreme as any.
    a = np.array([1.0] * 10 + [0.0] * 10 + [1.0] * 280)
    b = np.array([0.0] * 10 + [1.0] * 10 + [1.0] * 280)
    assert paired_p_value(a, b) == 1.0


def test_the_p_value_agrees_with_mcnemars_exact_test() -> None:
    # 4 against 14 discordant pairs: 2 * P(Binomial(18, 1/2) <= 4) = 0.0309
    a = np.array([1.0] * 4 + [0.0] * 14 + [1.0] * 40)
    b = np.array([0.0] * 4 + [1.0] * 14 + [1.0] * 40)
    assert paired_p_value(a, b, num_resamples=20000) == pytest.approx(0.0309, abs=0.005)


def test_false_alarms_are_as_rare_as_promised(rng: np.random.Generator) -> None:
    p_values = [
        paired_p_value(rng.normal(size=40), rng.normal(size=40), seed=i, num_resamples=300)
        for i in range(200)
    ]
    assert 1 <= sum(p <= 0.05 for p in p_values) <= 20


def test_a_difference_of_proportions_keeps_a_width_at_the_ends() -> None:
    found = difference(Sample.mean_of(np.zeros(160)), Sample.mean_of(np.ones(160)))
    assert found.estimate.value == found.estimate.high == 1.0
    assert 0.9 < found.estimate.low < 1.0
    same = difference(Sample.mean_of(np.ones(160)), Sample.mean_of(np.ones(160)))
    assert same.p_value == 1.0
    assert same.estimate.low < 0.0 == same.estimate.value < same.estimate.high


def test_newcombes_published_example() -> None:
    # 36 pairs both right, 12 and 2 discordant, none both wrong: method 10 gives 0.0569 to 0.3404.
    a = np.array([1.0] * 36 + [0.0] * 12 + [1.0] * 2)
    b = np.array([1.0] * 36 + [1.0] * 12 + [0.0] * 2)
    found = difference(Sample.mean_of(a), Sample.mean_of(b)).estimate
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.0569, abs=5e-4)
    assert found.high == pytest.approx(0.3404, abs=5e-4)


def test_a_paired_difference_is_surer_than_an_unpaired_one(rng: np.random.Generator) -> None:
    hard = rng.normal(0, 5, size=100)
    a, b = hard + rng.normal(0, 0.1, 100), hard + 1 + rng.normal(0, 0.1, 100)
    found = difference(Sample.mean_of(a), Sample.mean_of(b))
    assert 0.9 < found.estimate.low < 1.0 < found.estimate.high < 1.1
    assert found.p_value < 0.001
    assert json.dumps(found.to_json())


def test_bleu_differs_by_resampling_both_systems_together() -> None:
    references = [[f"the {w} pub is near the river and it is cheap"] for w in "abcdefghijklmnop"]
    good = [group[0].replace("cheap", "low") for group in references]
    poor = [group[0].replace("near the river", "far off") for group in references]
    a = Sample(bleu_statistics(poor, references), bleu_of)
    b = Sample(bleu_statistics(good, references), bleu_of)
    found = difference(a, b)
    assert found.estimate.value == pytest.approx(b.value() - a.value())
    assert found.estimate.low > 0.1
    assert found.p_value < 0.001


def test_nothing_to_score_is_an_error() -> None:
    for call in (
        lambda: bootstrap([]),
        lambda: wilson(0, 0),
        lambda: paired_p_value([], []),
        lambda: estimate(Sample.mean_of([])),
    ):
        with pytest.raises(DataError, match="no examples"):
            call()
    with pytest.raises(DataError, match="same examples"):
        paired_p_value([1.0, 2.0], [1.0])
