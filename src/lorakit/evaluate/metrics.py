"""Scores of an answer against its references; pure functions, all between 0 and 1.

Every metric takes several references per answer. BLEU and ROUGE-L equal the official script of the
E2E challenge (tuetschek/e2e-metrics) on its own data: BLEU to four decimals, ROUGE-L to 0.0005.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from lorakit.errors import DataError

Floats = NDArray[np.float64]

_ORDERS = 4
_ROUGE_BETA = 1.2
_ROUGE_TOKEN = re.compile(r"\w+(?:[-']\w+)*|[£$]|\S")
# What the official script removes after tokenising.
_ROUGE_DROPPED = frozenset([*".?!,:;-'\"`()[]{}", "--", "...", "''", "``", "“", "”", "‘", "’"])
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, else 0.

    Runs of whitespace count as one space and whitespace at the ends does not count; case and
    punctuation do.
    """
    return float(_squeeze(answer) in {_squeeze(reference) for reference in references})


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words shared with the best reference, as SQuAD's script counts them.

    Lower-cased, without ASCII punctuation and the words a, an, the, split at whitespace. Two texts
    without words agree (1).
    """
    return max((_f1(answer, reference) for reference in references), default=0.0)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L as the E2E script (and coco-caption) computes it.

    F = (1 + b^2) P R / (R + b^2 P) with b = 1.2, where P and R are the largest precision and the
    largest recall of the longest common subsequence over the references, each taken on its own.
    Tokens are lower-cased words, currency signs and marks; sentence marks, quotes and brackets are
    dropped. The corpus score is the mean over answers.
    """
    tokens = rouge_tokens(answer)
    precision = recall = 0.0
    for reference in references:
        other = rouge_tokens(reference)
        if tokens and other:
            common = _common_length(tokens, other)
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(other))
    if precision == 0.0 or recall == 0.0:
        return 0.0
    weight = _ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def bleu_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """What corpus BLEU-4 needs of each answer, (n, 10): sums of rows give the corpus' statistics.

    Columns: length of the answer, closest reference length, matched n-grams of order 1-4, n-grams
    of order 1-4. Options: lower-cased, tokenised as mteval-v13a, several references (counts are
    clipped by the largest of them).

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    require_references(answers, references)
    # `force` only silences the advice about text that looks tokenised.
    bleu = BLEU(lowercase=True, tokenize="13a", force=True)
    rows = np.zeros((len(answers), 2 + 2 * _ORDERS))
    for row, answer, group in zip(rows, answers, references, strict=True):
        score = bleu.corpus_score([answer], [[reference] for reference in group])
        row[:] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def bleu_of(statistics: Floats) -> Floats:
    """Corpus BLEU-4, (...), from summed statistics (..., 10).

    BLEU = exp(min(0, 1 - ref/len)) * exp(mean over n of log p_n) (Papineni et al. 2002). Orders
    without a match are smoothed as sacrebleu does by default: the k-th such order has
    p = 1 / (2^k total).
    """
    length, closest = statistics[..., 0], statistics[..., 1]
    matched, total = statistics[..., 2 : 2 + _ORDERS], statistics[..., 2 + _ORDERS :]
    missing = (matched == 0) & (total > 0)
    smoothed = 2.0 ** -np.cumsum(missing, axis=-1)
    precision = np.where(missing, smoothed, matched) / np.maximum(total, 1.0)
    # A corpus too short to have any 4-gram has BLEU 0, and so has one that shares no word.
    usable = (total > 0).all(axis=-1) & (matched > 0).any(axis=-1)
    logs = np.log(np.where(precision > 0, precision, 1.0)).mean(axis=-1)
    penalty = np.minimum(0.0, 1.0 - closest / np.maximum(length, 1.0))
    return np.where(usable, np.exp(penalty + logs), 0.0)


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of the answers, between 0 and 1; see `bleu_statistics` for the options.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    return float(bleu_of(bleu_statistics(answers, references).sum(axis=0)))


def corpus_rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean ROUGE-L of the answers; see `rouge_l`.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    require_references(answers, references)
    scores = [rouge_l(a, group) for a, group in zip(answers, references, strict=True)]
    return sum(scores) / len(scores)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _f1(answer: str, reference: str) -> float:
    words, other = _words(answer), _words(reference)
    if not words or not other:
        return float(words == other)
    shared = sum((Counter(words) & Counter(other)).values())
    return 2 * shared / (len(words) + len(other))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased words, currency signs and marks, without sentence marks, quotes and brackets."""
    return [t for t in _ROUGE_TOKEN.findall(text.lower()) if t not in _ROUGE_DROPPED]


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hit = row & places.get(token, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def require_references(answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse references that do not fit the answers.

    Raises:
        DataError: not one list of references per answer, or an empty one.
    """
    if not answers or len(answers) != len(references):
        raise DataError(
            "answers and references do not fit together",
            expected="at least one answer, and one list of references for each",
            found=f"{len(answers)} answers, {len(references)} lists of references",
        )
    for index, group in enumerate(references):
        if not group:
            raise DataError("an answer has no reference", where=f"answer {index}")
