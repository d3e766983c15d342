"""NIST and CIDEr-D: scores that weigh an n-gram by how rare it is in all references.

Both equal the official script of the E2E challenge (tuetschek/e2e-metrics) on its own data: NIST
to four decimals, CIDEr to 0.006 (its tokenizer is a Java program; ours is ROUGE-L's).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lorakit.evaluate.metrics import Floats, require_references, rouge_tokens

_NIST_ORDERS = 5
_CIDER_ORDERS = 4
_CIDER_SIGMA = 6.0
# A system of two thirds of the references' length gets half the score.
_NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2

Gram = tuple[str, ...]


def nist_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """What corpus NIST-5 needs of each answer, (n, 11): sums of rows give the corpus' statistics.

    Columns: information of the matched n-grams of order 1-5, n-grams of order 1-5, mean length of
    the references. The information of an n-gram is log2(count of its first n - 1 tokens / count of
    it) over all references (Doddington 2002). Lower-cased, tokenised as mteval-v13a; counts are
    clipped by the largest of the references.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    require_references(answers, references)
    groups = [[_nist_tokens(text) for text in group] for group in references]
    information = _information([tokens for group in groups for tokens in group])
    rows = np.zeros((len(answers), 2 * _NIST_ORDERS + 1))
    for row, answer, group in zip(rows, answers, groups, strict=True):
        tokens = _nist_tokens(answer)
        for n in range(1, _NIST_ORDERS + 1):
            most: Counter[Gram] = Counter()
            for reference in group:
                most |= _grams(reference, n)
            matched = _grams(tokens, n) & most
            row[n - 1] = sum(count * information[gram] for gram, count in matched.items())
            row[_NIST_ORDERS + n - 1] = max(0, len(tokens) - n + 1)
        row[-1] = sum(map(len, group)) / len(group)
    return rows


def nist_of(statistics: Floats) -> Floats:
    """Corpus NIST-5, (...), from summed statistics (..., 11).

    NIST = sum over n of (information matched / n-grams) * exp(-beta ln(min(1, len / ref))^2), with
    beta such that two thirds of the length halve the score.
    """
    matched = statistics[..., :_NIST_ORDERS]
    total = statistics[..., _NIST_ORDERS : 2 * _NIST_ORDERS]
    ratio = np.minimum(1.0, total[..., 0] / np.maximum(statistics[..., -1], 1e-9))
    logs = np.log(np.where(ratio > 0, ratio, 1.0))
    penalty = np.where(ratio > 0, np.exp(-_NIST_BETA * logs**2), 0.0)
    return (matched / np.maximum(total, 1.0)).sum(axis=-1) * penalty


def corpus_nist(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus NIST-5 of the answers, 0 or more; see `nist_statistics` for the options.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    return float(nist_of(nist_statistics(answers, references).sum(axis=0)))


def cider_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, from 0 to 10 (Vedantam et al. 2015, as coco-caption computes it).

    The mean over n = 1 ... 4 of the clipped cosine of tf-idf vectors, times exp(-(difference of
    length)^2 / (2 * 6^2)), the mean over references, times 10. The idf is that of the given
    references, log(answers / answers with the n-gram): a score on some questions does not compare
    with a score on others.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    require_references(answers, references)
    groups = [[rouge_tokens(text) for text in group] for group in references]
    seen: Counter[Gram] = Counter()
    for group in groups:
        orders = range(1, _CIDER_ORDERS + 1)
        seen.update({gram for tokens in group for n in orders for gram in _grams(tokens, n)})
    idf = {gram: math.log(len(groups)) - math.log(count) for gram, count in seen.items()}
    rarest = math.log(len(groups))
    found: list[float] = []
    for answer, group in zip(answers, groups, strict=True):
        mine = _weighted(rouge_tokens(answer), idf, rarest)
        alike = [_cider(mine, _weighted(reference, idf, rarest)) for reference in group]
        found.append(10 * sum(alike) / len(alike))
    return found


Weighted = tuple[int, list[dict[Gram, float]]]


def _weighted(tokens: list[str], idf: dict[Gram, float], rarest: float) -> Weighted:
    """The length in bigrams, as coco-caption measures it, and the tf-idf of each order."""
    orders = range(1, _CIDER_ORDERS + 1)
    return max(0, len(tokens) - 1), [
        {gram: count * idf.get(gram, rarest) for gram, count in _grams(tokens, n).items()}
        for n in orders
    ]


def _cider(answer: Weighted, reference: Weighted) -> float:
    """The mean over the orders of one answer's likeness to one reference."""
    scale = math.exp(-((answer[0] - reference[0]) ** 2) / (2 * _CIDER_SIGMA**2))
    total = 0.0
    for mine, other in zip(answer[1], reference[1], strict=True):
        product = sum(
            min(w, other[gram]) * other[gram] for gram, w in mine.items() if gram in other
        )
        norms = math.hypot(*mine.values()) * math.hypot(*other.values())
        total += product / norms if norms else 0.0
    return scale * total / _CIDER_ORDERS


def _information(references: Sequence[list[str]]) -> dict[Gram, float]:
    counts: Counter[Gram] = Counter()
    for tokens in references:
        for n in range(1, _NIST_ORDERS + 1):
            counts.update(_grams(tokens, n))
    counts[()] = sum(map(len, references))
    return {gram: math.log2(counts[gram[:-1]] / count) for gram, count in counts.items() if gram}


def _grams(tokens: list[str], n: int) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def _nist_tokens(text: str) -> list[str]:
    return _tokenizer()(text.lower()).split()
