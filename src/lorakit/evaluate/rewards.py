"""What one written answer earns: metrics of `lorakit eval`, and functions of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import SupportsFloat

from transformers import PreTrainedTokenizerBase

from lorakit.data.options import SftOptions
from lorakit.data.rows import Row, Rows
from lorakit.data.sft import render_prompt
from lorakit.errors import ConfigError, DataError, TrainingError, unknown_name
from lorakit.evaluate.options import EvalOptions
from lorakit.evaluate.scoring import SCORERS
from lorakit.evaluate.tasks import Question, build_questions
from lorakit.progress import progress

# function(answer: str, row: dict) -> float; the row as it was read, the answer without whitespace
# at its ends.
RewardFunction = Callable[[str, Row], float]

_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that answers are written to, and what a reward may look at.

    Attributes:
        prompt_ids: what the model continues.
        row: as it was read.
        origin: where.
        question: what metrics look at; None where only functions of the user's are asked.
    """

    prompt_ids: tuple[int, ...]
    row: Row
    origin: str
    question: Question | None


class Rewards:
    """The weighted sum of one or several rewards.

    Args:
        weights: from a metric that scores single answers, or "module.py:function" or
            "package.module:function", to its weight.

    Raises:
        ConfigError: a function that cannot be loaded.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._metrics = tuple(name for name in weights if name in SCORERS)
        self._functions = {n: load_function(n) for n in weights if n not in SCORERS}

    def ask(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, options: SftOptions, *, label: str
    ) -> list[Asked]:
        """One prompt per row, in their order.

        Args:
            rows: see `lorakit.evaluate.tasks` for the columns that metrics need.
            tokenizer: not changed.
            options: columns and template.
            label: of the progress bar.

        Raises:
            DataError: no rows, or a row without a prompt or what a metric needs.
        """
        if not len(rows):
            raise DataError("the data is empty", where=rows.source, found="0 rows")
        found: list[Asked] = []
        with progress(label, len(rows)) as bar:
            for start in range(0, len(rows), _CHUNK_ROWS):
                found += self._ask(rows[start : start + _CHUNK_ROWS], tokenizer, options)
                bar.advance(min(_CHUNK_ROWS, len(rows) - start))
        return found

    def _ask(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, options: SftOptions
    ) -> list[Asked]:
        if not self._metrics:
            return [
                Asked(
                    tuple(render_prompt(row, tokenizer, options, where=rows.origin(i))),
                    row,
                    rows.origin(i),
                    None,
                )
                for i, row in enumerate(rows)
            ]
        asked = EvalOptions(metrics=self._metrics, group_by_prompt=False, sft=options)
        questions = build_questions(rows, tokenizer, asked)
        return [
            Asked(question.prompt_ids, row, question.origin, question)
            for row, question in zip(rows, questions, strict=True)
        ]

    def score(self, asked: Sequence[Asked], answers: Sequence[str]) -> list[float]:
        """What each answer earns.

        Args:
            asked: the prompt of each answer.
            answers: without whitespace at their ends.

        Raises:
            TrainingError: a function failed or gave no finite number; the row is named.
        """
        total = [0.0] * len(answers)
        for name, weight in self._weights.items():
            for i, score in enumerate(self._scores(name, asked, answers)):
                total[i] += weight * score
        return total

    def _scores(self, name: str, asked: Sequence[Asked], answers: Sequence[str]) -> Sequence[float]:
        function = self._functions.get(name)
        if function is not None:
            return [_call(name, function, *each) for each in zip(asked, answers, strict=True)]
        questions = [one.question for one in asked if one.question is not None]
        scores = SCORERS[name](questions, answers).scores
        assert scores is not None  # metrics over all answers together are refused by the config
        return scores


def _call(name: str, function: RewardFunction, asked: Asked, answer: str) -> float:
    try:
        found = function(answer, dict(asked.row))
    except (Exception, SystemExit) as error:
        raise TrainingError(
            "a reward function failed",
            where=f"{name}, {asked.origin}",
            expected="a number for every answer, also for one that makes no sense",
            found=f"{type(error).__name__}: {error}, for the answer {answer[:80]!r}",
            remedy="catch it in the function and give such an answer a low reward",
        ) from error
    reward = _as_number(found)
    if not math.isfinite(reward):
        raise TrainingError(
            "a reward is not a finite number",
            where=f"{name}, {asked.origin}",
            expected="a finite int, float or bool",
            found=f"{found!r}, for the answer {answer[:80]!r}",
        )
    return reward


def _as_number(found: object) -> float:
    """A reward as a float: also numpy's numbers and torch's; nan for what is none."""
    try:
        return float(found) if isinstance(found, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def load_function(name: str) -> RewardFunction:
    """A reward function of the user's.

    Args:
        name: "file.py:function", or "package.module:function".

    Raises:
        ConfigError: there is no such module or function, or it does not take an answer and a row.
    """
    place, _, function = name.rpartition(":")
    module = _module(name, place)
    found = vars(module).get(function)
    if found is None:
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise unknown_name(
            ConfigError,
            f"{place} has no function {function!r}",
            function,
            known,
            where="grpo.reward",
        )
    try:
        inspect.signature(found).bind("answer", {})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "this is no reward function",
            where=f"grpo.reward: {name}",
            expected="function(answer: str, row: dict) -> float",
            found=str(error),
        ) from error
    return found


def function_hashes(weights: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every file that holds a reward function, by the function's name.

    Args:
        weights: as for `Rewards`; metrics and functions of installed packages are left out.
    """
    files = {name: Path(name.rpartition(":")[0]) for name in weights}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if file.suffix == ".py"
    }


def _module(name: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        own = f"_lorakit_reward_{Path(place).stem}"
        spec = importlib.util.spec_from_file_location(own, place)
        assert spec is not None  # of every name that ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[own] = module  # as an import would: dataclasses look their module up
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            "the module of a reward function cannot be imported",
            where=f"grpo.reward: {name}",
            expected="a file of Python, relative to the current directory, or a module on the path",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return module
