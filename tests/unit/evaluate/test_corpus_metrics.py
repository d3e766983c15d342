from __future__ import annotations

import math

import numpy as np
import pytest

from lorakit.errors import DataError
from lorakit.evaluate.corpus_metrics import cider_scores, corpus_nist, nist_of, nist_statistics


def test_nist_counts_the_information_of_what_matches() -> None:
    # Five words, "a" twice: log2(5/2) for "a", log2(5) for the others; "a b" after "a": log2(2/1).
    found = nist_statistics(["a b"], [["a b a c d"]])[0]
    assert found[0] == pytest.approx(math.log2(5 / 2) + math.log2(5))
    assert found[1] == pytest.approx(1.0)
    assert found[2] == 0.0
    assert found[5:].tolist() == [2, 1, 0, 0, 0, 5]
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(2 / 5) ** 2)
    expected = (found[0] / 2 + found[1] / 1) * penalty
    assert corpus_nist(["a b"], [["a b a c d"]]) == pytest.approx(expected)


def test_nist_halves_at_two_thirds_of_the_length_and_does_not_reward_length() -> None:
    statistics = np.array(
        [[4.0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 3.0], [4.0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 1.0]]
    )
    assert nist_of(statistics).tolist() == pytest.approx([1.0, 2.0])
    assert nist_of(np.zeros(11)) == 0.0


def test_nist_clips_by_the_largest_reference_and_ignores_case() -> None:
    once = nist_statistics(["The the the"], [["the cat", "the the dog"]])[0]
    assert once[0] == pytest.approx(2 * math.log2(5 / 3))


def test_cider_is_ten_for_the_reference_itself_and_nothing_for_what_all_share() -> None:
    references = [["the red cat sat here"], ["the big dog ran away"]]
    same = cider_scores(["the red cat sat here", "the big dog ran away"], references)
    assert same == pytest.approx([10.0, 10.0])
    shared, _ = cider_scores(["the", "the big dog ran away"], references)
    assert shared == 0.0
    assert cider_scores(["the cat"], [["the cat"]]) == [0.0]


def test_cider_punishes_repetition_and_length() -> None:
    references = [["red cat"], ["big dog"]]
    right, _ = cider_scores(["red cat", ""], references)
    # Clipped: the second "red cat" gains nothing, and three bigrams are two too many.
    double, _ = cider_scores(["red cat red cat", ""], references)
    one = math.log(2)
    unigrams = 2 * one * one / (math.hypot(2 * one, 2 * one) * math.hypot(one, one))
    bigrams = one * one / (math.hypot(2 * one, one) * one)
    assert right == pytest.approx(10 * 2 / 4)
    assert double == pytest.approx(10 * math.exp(-4 / 72) * (unigrams + bigrams) / 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError):
        corpus_nist(["a"], [])
    with pytest.raises(DataError):
        cider_scores(["a"], [[]])
