from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import sacrebleu

from lorakit.errors import DataError
from lorakit.evaluate.metrics import (
    bleu_of,
    bleu_statistics,
    corpus_bleu,
    corpus_rouge_l,
    exact_match,
    rouge_l,
    token_f1,
)

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ",", ".", "near", "£", "20", "big", "Pub"]


def sentences(seed: int, num: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) for _ in range(num)]


def test_exact_match_squeezes_whitespace_and_nothing_else() -> None:
    assert exact_match(" SELECT  a\nFROM b ", ["x", "SELECT a FROM b"]) == 1.0
    assert exact_match("select a from b", ["SELECT a FROM b"]) == 0.0
    assert exact_match("a.", ["a"]) == 0.0
    assert exact_match("a", []) == 0.0


def test_token_f1_is_squads() -> None:
    assert token_f1("The cat, sat!", ["a cat sat"]) == 1.0
    assert token_f1("cat sat here", ["cat sat"]) == pytest.approx(0.8)
    assert token_f1("cat cat", ["cat dog dog"]) == pytest.approx(2 / 5)
    assert token_f1("dog", ["cat", "dog"]) == 1.0
    assert token_f1("the", ["a"]) == 1.0
    assert token_f1("", ["cat"]) == 0.0
    assert token_f1("cat", []) == 0.0


def test_rouge_takes_the_best_precision_and_the_best_recall_apart() -> None:
    # Precision 1 from the long reference, recall 1 from the short one.
    assert rouge_l("a b", ["a b c d", "a"]) == pytest.approx(1.0)
    # P = 1/2, R = 1/4: (1 + 1.44) P R / (R + 1.44 P)
    assert rouge_l("a x", ["a b c d"]) == pytest.approx(2.44 * 0.125 / (0.25 + 0.72))
    assert rouge_l("x", ["a"]) == 0.0
    assert rouge_l("", ["a"]) == 0.0
    assert rouge_l("A, b.", ["a b"]) == 1.0


def test_the_common_subsequence_is_the_longest() -> None:
    rng = random.Random(3)
    for _ in range(60):
        a = [rng.choice("abc") for _ in range(rng.randint(1, 7))]
        b = [rng.choice("abc") for _ in range(rng.randint(1, 9))]
        best = 0
        for size in range(len(a), 0, -1):
            if any(_inside(c, b) for c in itertools.combinations(a, size)):
                best = size
                break
        p, r = best / len(a), best / len(b)
        expected = 2.44 * p * r / (r + 1.44 * p) if best else 0.0
        assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(expected)


def _inside(part, whole) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_sacrebleu(seed: int) -> None:
    answers = sentences(seed, 7)
    references = [sentences(100 * seed + i, 1 + i % 3) for i in range(7)]
    streams = [[group[k] if k < len(group) else None for group in references] for k in range(3)]
    own = sacrebleu.corpus_bleu(answers, streams, lowercase=True, tokenize="13a").score
    assert corpus_bleu(answers, references) == pytest.approx(own / 100, abs=1e-12)


def test_bleu_of_resampled_sums_equals_sacrebleu_on_the_resampled_corpus() -> None:
    answers, references = sentences(1, 9), [sentences(i, 2) for i in range(9)]
    statistics = bleu_statistics(answers, references)
    draws = np.random.default_rng(0).integers(0, 9, size=(5, 9))
    sums = statistics[draws].sum(axis=1)
    for picked, score in zip(draws, bleu_of(sums), strict=True):
        streams = [[references[i][k] for i in picked] for k in range(2)]
        own = sacrebleu.corpus_bleu([answers[i] for i in picked], streams, lowercase=True).score
        assert score == pytest.approx(own / 100, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references"),
    [
        ("cat", ["cat"]),  # no 4-gram at all
        ("", ["cat"]),
        ("zebra zoo zig zag", ["cat sat on mat"]),
        ("cat zoo zig zag on", ["cat sat on mat"]),  # matched unigrams only
        ("cat sat on mat", ["cat sat on mat and so on and on"]),
    ],
)
def test_bleu_at_its_edges_equals_sacrebleu(answer: str, references: list[str]) -> None:
    own = sacrebleu.corpus_bleu([answer], [references], lowercase=True).score
    assert corpus_bleu([answer], [references]) == pytest.approx(own / 100, abs=1e-12)


def test_bleu_ignores_case() -> None:
    assert corpus_bleu(["The Cat sat ON the mat"], [["the cat Sat on the mat"]]) == pytest.approx(1)


def test_corpus_rouge_is_the_mean() -> None:
    assert corpus_rouge_l(["a b", "x"], [["a b"], ["y"]]) == pytest.approx(0.5)


def test_references_must_fit() -> None:
    for answers, references in (([], []), (["a"], []), (["a"], [[]]), (["a"], [["a"], ["b"]])):
        with pytest.raises(DataError):
            corpus_bleu(answers, references)
        with pytest.raises(DataError):
            corpus_rouge_l(answers, references)
