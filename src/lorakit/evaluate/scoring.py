"""Answers to scores: one function per metric that is computed from what the model wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.evaluate import sql
from lorakit.evaluate.corpus_metrics import cider_scores, nist_of, nist_statistics
from lorakit.evaluate.intervals import Sample
from lorakit.evaluate.metrics import bleu_of, bleu_statistics, exact_match, rouge_l, token_f1
from lorakit.evaluate.tasks import Question


@dataclass(frozen=True, slots=True)
class Scored:
    """A metric over all answers.

    Attributes:
        sample: what the estimate is made from.
        scores: one score per answer; None where only the corpus has one (BLEU).
        notes: what else there is to say about each answer (why a query failed); may be empty.
    """

    sample: Sample
    scores: list[float] | None
    notes: list[str]


Scorer = Callable[[Sequence[Question], Sequence[str]], Scored]


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Scorer:
    def scorer(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
        scores = [score(a, q.references) for q, a in zip(questions, answers, strict=True)]
        return Scored(Sample.mean_of(scores), scores, [])

    return scorer


def _bleu(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    statistics = bleu_statistics(answers, [question.references for question in questions])
    return Scored(Sample(statistics, bleu_of), None, [])


def _nist(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    statistics = nist_statistics(answers, [question.references for question in questions])
    return Scored(Sample(statistics, nist_of), None, [])


def _cider(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    scores = cider_scores(answers, [question.references for question in questions])
    return Scored(Sample.mean_of(scores), scores, [])


def _sql_execution(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    verdicts = [_execute(q, answer) for q, answer in zip(questions, answers, strict=True)]
    scores = [score for score, _ in verdicts]
    return Scored(Sample.mean_of(scores), scores, [note for _, note in verdicts])


def _execute(question: Question, answer: str) -> tuple[float, str]:
    """Whether the query in the answer returns what a reference returns; if not, why."""
    assert question.database is not None
    try:
        rows = sql.run_sql(question.database, sql.extract_sql(answer))
    except sql.SqlError as error:
        return 0.0, f"{error.what}: {error.found}" if error.found else error.what
    for reference, expected in zip(question.references, question.reference_results, strict=True):
        if sql.same_result(rows, expected, ordered=sql.is_ordered(reference)):
            return 1.0, ""
    return 0.0, "other rows than the reference"


SCORERS: dict[str, Scorer] = {
    "exact_match": _mean_of(exact_match),
    "token_f1": _mean_of(token_f1),
    "rouge_l": _mean_of(rouge_l),
    "bleu": _bleu,
    "nist": _nist,
    "cider": _cider,
    "sql_execution": _sql_execution,
}
