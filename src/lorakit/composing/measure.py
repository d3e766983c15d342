"""Each part's own task before and after composing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import detach
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.composition.recipe import Part
from lorakit.data.rows import Rows
from lorakit.errors import StateError
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.run import evaluate

COMPOSED = "composed"
BASE = "base"


@dataclass(frozen=True, slots=True)
class PartTask:
    """The task of one part.

    Attributes:
        part: the part's name.
        rows: its data.
        options: what is measured, and how rows are read.
    """

    part: str
    rows: Rows
    options: EvalOptions


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    composed: Adapter,
    tasks: Sequence[PartTask],
) -> list[dict[str, Any]]:
    """Score each task with its own part, with the composed adapter, and with the base.

    Args:
        model: the base, nothing attached; left as it was.
        tokenizer: its tokenizer.
        parts: the adapters, at their full strength.
        composed: what they became.
        tasks: one per part that has data.

    Returns:
        Per task plain values: the scores of the three systems, and what composing changed against
        the part alone, with interval and p-value.

    Raises:
        DataError, StateError: see `evaluate`.
    """
    adapters = {part.name: part.adapter for part in parts}
    results: list[dict[str, Any]] = []
    try:
        bind_adapter(model, composed, COMPOSED, any_base=True)
        for task in tasks:
            bind_adapter(model, adapters[task.part], task.part, any_base=True)
            try:
                systems = {task.part: task.part, COMPOSED: COMPOSED, BASE: None}
                found = evaluate(model, tokenizer, task.rows, task.options, systems=systems)
            finally:
                detach(model, task.part)
            changed = found.differences[COMPOSED]
            results.append(
                {
                    "part": task.part,
                    "data": task.rows.source,
                    "num_rows": found.num_rows,
                    "metrics": {
                        metric: {
                            "higher_is_better": METRICS[metric].higher_is_better,
                            "part": found.systems[task.part].scores[metric].to_json(),
                            "composed": found.systems[COMPOSED].scores[metric].to_json(),
                            "base": found.systems[BASE].scores[metric].to_json(),
                            "difference": changed[metric].to_json(),
                        }
                        for metric in changed
                    },
                }
            )
    finally:
        with suppress(StateError):
            detach(model, COMPOSED)
    return results
