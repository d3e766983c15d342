"""What was learned and what was forgotten: the task beside text that has nothing to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.data.options import SftOptions
from lorakit.data.rows import Rows
from lorakit.errors import RequestError
from lorakit.evaluate.intervals import Difference, Estimate, Sample, difference
from lorakit.evaluate.options import EvalOptions
from lorakit.evaluate.run import evaluate
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model, load_tokenizer

BASE = "base"
TASK = "task"
_PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class ForgettingRequest:
    """What is compared on what.

    Attributes:
        base: the base model, as `load_model` names it.
        systems: label -> directory of anything that a method saved on this base: an adapter, a
            fully fine-tuned model.
        task: the rows that were (or were not) learned.
        options: what is measured on them.
        held_out: name -> rows that have nothing to do with the task; perplexity is measured.
        max_length: longest held-out row in tokens; the rest is cut off.
        any_base: accept what was trained on another base.
        dtype: see `load_base_model`.
        device: see `load_base_model`.
    """

    base: str
    systems: Mapping[str, str | Path]
    task: Rows
    options: EvalOptions
    held_out: Mapping[str, Rows] = field(default_factory=dict[str, Rows])
    max_length: int = 512
    any_base: bool = False
    dtype: str | torch.dtype | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """Scores of the base and of every system, and what each system gained or lost.

    Attributes:
        scores: label -> "task exact_match", "general perplexity", ... -> estimate.
        differences: label (without the base) -> the same names -> its score minus the base's, on
            the same rows.
        higher_is_better: score name -> whether more is better.
        num_rows: score name -> rows.
    """

    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Difference]]
    higher_is_better: dict[str, bool]
    num_rows: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the form of an evaluation."""
        return {
            "kind": "forgetting",
            "baseline": BASE,
            "metrics": {
                name: {"higher_is_better": better, "num_rows": self.num_rows[name]}
                for name, better in self.higher_is_better.items()
            },
            "systems": {
                label: {"scores": {name: found.to_json() for name, found in scores.items()}}
                for label, scores in self.scores.items()
            },
            "differences": {
                label: {name: found.to_json() for name, found in changes.items()}
                for label, changes in self.differences.items()
            },
        }


def measure_forgetting(request: ForgettingRequest) -> Forgetting:
    """Score the base and every system on the task and on the held-out rows.

    The systems are loaded one after the other, each on a base of its own, so that full fine-tuning
    needs no second copy of the weights. Intervals are 95 %; a difference is paired over the rows.

    Raises:
        RequestError: nothing to compare, or a name that is taken.
        DataError, ModelError, AdapterFileError, BaseMismatchError: see `evaluate` and `load_saved`.
    """
    _check(request)
    tokenizer = load_tokenizer(request.base)
    samples: dict[str, dict[str, Sample]] = {}
    scores: dict[str, dict[str, Estimate]] = {}
    num_rows: dict[str, int] = {}
    better: dict[str, bool] = {}
    for label, path in {BASE: None, **request.systems}.items():
        model = load_base_model(request.base, dtype=request.dtype, device=request.device)
        if path is not None:
            load_saved(model, path, any_base=request.any_base)
        found = _Scores(model, tokenizer)
        found.add(TASK, request.task, request.options)
        for name, rows in request.held_out.items():
            found.add(name, rows, _held_out_options(request))
        samples[label], scores[label] = found.samples, found.scores
        num_rows, better = found.num_rows, found.higher_is_better
        del model, found
    seed = request.options.seed
    return Forgetting(
        scores=scores,
        differences={
            label: {
                name: difference(samples[BASE][name], sample, seed=seed)
                for name, sample in measured.items()
            }
            for label, measured in samples.items()
            if label != BASE
        },
        higher_is_better=better,
        num_rows=num_rows,
    )


class _Scores:
    """The scores of one system on all rows."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.samples: dict[str, Sample] = {}
        self.scores: dict[str, Estimate] = {}
        self.num_rows: dict[str, int] = {}
        self.higher_is_better: dict[str, bool] = {}

    def add(self, where: str, rows: Rows, options: EvalOptions) -> None:
        """Measure one set of rows; its scores are named after it."""
        # Whatever is on the model is active; the plan of a method is no part of the evaluation.
        found = evaluate(self.model, self.tokenizer, rows, options, systems={where: nullcontext})
        system = found.systems[where]
        metrics = found.to_json(max_outputs=0)["metrics"]
        for metric, sample in system.samples.items():
            name = f"{where} {metric.replace('_', ' ')}"
            self.samples[name] = sample
            self.scores[name] = system.scores[metric]
            self.num_rows[name] = found.num_rows
            self.higher_is_better[name] = metrics[metric]["higher_is_better"]


def _held_out_options(request: ForgettingRequest) -> EvalOptions:
    return replace(
        request.options,
        metrics=(_PERPLEXITY,),
        group_by_prompt=None,
        sft=SftOptions(max_length=request.max_length),
    )


def _check(request: ForgettingRequest) -> None:
    if not request.systems:
        raise RequestError(
            "there is nothing to compare with the base",
            where="systems",
            expected="an adapter, or a fully fine-tuned model",
        )
    if BASE in request.systems:
        raise RequestError(
            f"the name {BASE!r} is the base's own",
            where="systems",
            remedy="give this system another name",
        )
    if TASK in request.held_out:
        raise RequestError(
            f"the name {TASK!r} is the task's own",
            where="held_out",
            remedy="give these rows another name",
        )
