"""Measure several systems on the same rows: the base model and adapters attached to it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.attach import use
from lorakit.data.rows import Rows
from lorakit.data.sft import Example, build_examples
from lorakit.errors import DataError, LorakitWarning
from lorakit.evaluate.generate import Answer, check_prompts, generate_answers
from lorakit.evaluate.intervals import Difference, Estimate, Sample, difference, estimate
from lorakit.evaluate.likelihood import answer_nll, best_choices, perplexity_of
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.scoring import SCORERS
from lorakit.evaluate.tasks import Choices, Question, build_choices, build_questions
from lorakit.models.causal import require_causal
from lorakit.models.vocabulary import require_embeddings

# What a system is: an adapter's name on the model, None for the base alone, or what switches the
# model over for a block.
System = str | None | Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer of one system, with its score by every metric that scores single answers."""

    text: str
    num_tokens: int
    finished: bool
    scores: dict[str, float]
    notes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        return {
            "text": self.text,
            "num_tokens": self.num_tokens,
            "finished": self.finished,
            "scores": self.scores,
            "notes": self.notes,
        }


@dataclass(slots=True)
class SystemResult:
    """Everything measured of one system.

    Attributes:
        samples: per metric, the statistics of each example.
        scores: per metric, the estimate.
        answers: one per question; empty if no metric needs answers.
        picked: the most likely choice of each row; empty if choice is not measured.
        seconds: wall time of all forward passes and scoring.
        answering_s: the part of it spent writing answers.
    """

    samples: dict[str, Sample] = field(default_factory=dict[str, Sample])
    scores: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    answers: list[ScoredAnswer] = field(default_factory=list[ScoredAnswer])
    picked: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    answering_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens written per second; None if no answers were written."""
        if not self.answers:
            return None
        return sum(answer.num_tokens for answer in self.answers) / max(self.answering_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Scores and times as plain JSON values, without the answers."""
        return {
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "seconds": self.seconds,
            "num_answers": len(self.answers),
            "num_tokens": sum(answer.num_tokens for answer in self.answers),
            "tokens_per_s": self.tokens_per_s,
        }


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What was measured of all systems on the same rows.

    Attributes:
        baseline: the system that the others are compared with: the first one.
        systems: per system, its scores and answers.
        differences: per other system and metric, its score minus the baseline's.
        questions: what was asked, in the order of the answers.
        prompts: the text of each question's prompt.
        num_rows: the rows that were used.
    """

    baseline: str
    systems: dict[str, SystemResult]
    differences: dict[str, dict[str, Difference]]
    questions: list[Question]
    prompts: list[str]
    num_rows: int

    def to_json(self, *, max_outputs: int | None = None) -> dict[str, Any]:
        """The result as plain JSON values, with the answers to the first `max_outputs` questions.

        Args:
            max_outputs: None for all.
        """
        first = next(iter(self.systems.values()))
        return {
            "num_rows": self.num_rows,
            "metrics": {
                name: {
                    "about": METRICS[name].about,
                    "higher_is_better": METRICS[name].higher_is_better,
                }
                for name in first.scores
            },
            "baseline": self.baseline,
            "systems": {name: system.to_json() for name, system in self.systems.items()},
            "differences": {
                name: {metric: found.to_json() for metric, found in metrics.items()}
                for name, metrics in self.differences.items()
            },
            "outputs": [self._output(i) for i in range(len(self.questions))[:max_outputs]],
        }

    def _output(self, index: int) -> dict[str, Any]:
        question = self.questions[index]
        return {
            "origin": question.origin,
            "question": question.text,
            "prompt": self.prompts[index],
            "references": list(question.references),
            "answers": {
                name: system.answers[index].to_json() for name, system in self.systems.items()
            },
        }


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that all systems are asked, made once."""

    questions: list[Question]
    examples: list[Example]
    origins: list[str]
    choices: Choices | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    options: EvalOptions,
    *,
    systems: Mapping[str, System] | None = None,
) -> EvalResult:
    """Measure each system on the same rows, and the difference of each to the first.

    All rows are read and checked before the model runs. The model is left as it was.

    Args:
        model: the base, with the adapters attached that are named.
        tokenizer: its tokenizer.
        rows: the data; see `lorakit.evaluate.tasks` for the columns that metrics need.
        options: what to measure.
        systems: from the name a system has in the result to what it is; by default the base alone.

    Raises:
        DataError: no rows, a row that lacks what a metric needs, a prompt that does not fit.
        ModelError: the model has no language-modelling head, which every metric needs, or sees the
            answers that it is to score.
        StateError: an adapter that is not attached.
    """
    systems = {"base": None} if systems is None else systems
    if not systems:
        raise DataError("there is no system to evaluate", expected="at least one")
    scores = options.needs("likelihood") or options.needs("choices")
    require_causal(model, or_seq2seq=not scores)
    for adapter in systems.values():
        with _using(model, adapter):  # refuses an unknown name now, not after the others have run
            pass
    work, num_rows = _prepare(model, tokenizer, rows, options)
    results: dict[str, SystemResult] = {}
    for name, adapter in systems.items():
        with _using(model, adapter):
            results[name] = _measure(model, tokenizer, work, options, name)
    baseline, *others = results
    differences = {
        name: {
            metric: difference(
                results[baseline].samples[metric], results[name].samples[metric], seed=options.seed
            )
            for metric in results[name].samples
        }
        for name in others
    }
    prompts = [
        str(tokenizer.decode(list(q.prompt_ids), skip_special_tokens=True)) for q in work.questions
    ]
    return EvalResult(baseline, results, differences, work.questions, prompts, num_rows)


def _using(model: PreTrainedModel, system: System) -> AbstractContextManager[object]:
    return system() if callable(system) else use(model, system)


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, options: EvalOptions
) -> tuple[_Work, int]:
    questions: list[Question] = []
    if options.needs("answers"):
        questions = build_questions(rows, tokenizer, options)
        origins = [question.origin for question in questions]
        check_prompts(model, [question.prompt_ids for question in questions], origins)
        # Every metric sees the same rows, also where rows were grouped and then limited.
        rows = rows.select(sorted(index for question in questions for index in question.rows))
    elif options.limit is not None:
        rows = rows[: options.limit]
    examples: list[Example] = []
    if options.needs("likelihood"):
        examples = list(build_examples(rows, tokenizer, options.sft))
        require_embeddings(model, tokenizer, (max(e.input_ids) for e in examples))
        _warn_of_missing(examples, rows)
    choices = None
    if options.needs("choices"):
        choices = build_choices(rows, tokenizer, options.sft)
    origins = [rows.origin(example.row) for example in examples]
    return _Work(questions, examples, origins, choices), len(rows)


def _warn_of_missing(examples: list[Example], rows: Rows) -> None:
    num_missing = len(rows) - len({example.row for example in examples})
    if num_missing:
        warnings.warn(
            f"perplexity leaves out {num_missing} of {len(rows)} rows: nothing in them is learned, "
            "or they are longer than max_length",
            LorakitWarning,
            stacklevel=4,
        )


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: _Work,
    options: EvalOptions,
    name: str,
) -> SystemResult:
    result = SystemResult()
    started = time.monotonic()
    if work.examples:
        statistics = answer_nll(
            model,
            work.examples,
            batch_size=options.batch_size,
            label=f"scoring, {name}",
            origins=work.origins,
        )
        result.samples["perplexity"] = Sample(statistics, perplexity_of)
    if work.choices is not None:
        _measure_choices(model, work.choices, options, name, result)
    if work.questions:
        answering = time.monotonic()
        answers = generate_answers(
            model,
            tokenizer,
            [question.prompt_ids for question in work.questions],
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            label=f"answering, {name}",
        )
        result.answering_s = time.monotonic() - answering
        _score_answers(work.questions, answers, options, result)
    order = list(dict.fromkeys(options.metrics))
    result.samples = {metric: result.samples[metric] for metric in order}
    result.scores = {m: estimate(result.samples[m], seed=options.seed) for m in order}
    result.seconds = time.monotonic() - started
    return result


def _measure_choices(
    model: PreTrainedModel,
    choices: Choices,
    options: EvalOptions,
    name: str,
    result: SystemResult,
) -> None:
    statistics = answer_nll(
        model,
        choices.examples,
        batch_size=options.batch_size,
        label=f"choosing, {name}",
        origins=choices.origins,
    )
    per_token = options.choice_normalisation == "tokens"
    picked = best_choices(statistics, [len(t) for t in choices.texts], per_token=per_token)
    result.picked = [texts[i] for texts, i in zip(choices.texts, picked, strict=True)]
    result.samples["choice"] = Sample.mean_of(
        np.asarray(picked) == np.asarray(choices.right)  # pyright: ignore[reportArgumentType]
    )


def _score_answers(
    questions: list[Question], answers: list[Answer], options: EvalOptions, result: SystemResult
) -> None:
    texts = [answer.text for answer in answers]
    scored = {name: SCORERS[name](questions, texts) for name in options.needs("answers")}
    result.samples.update({name: found.sample for name, found in scored.items()})
    for index, answer in enumerate(answers):
        scores = {n: f.scores[index] for n, f in scored.items() if f.scores is not None}
        notes = {n: f.notes[index] for n, f in scored.items() if f.notes and f.notes[index]}
        result.answers.append(
            ScoredAnswer(answer.text, answer.num_tokens, answer.finished, scores, notes)
        )
