"""Whether the rows of a run fit into the model's context with what a method puts beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sized

from transformers import PreTrainedModel

from lorakit.data.preference import Judged
from lorakit.errors import DataError, SpecError
from lorakit.methods.base import TrainableReport
from lorakit.models.positions import num_positions


def require_context(
    model: PreTrainedModel,
    plan: TrainableReport,
    method: str,
    data: Iterable[Iterable[Sized] | None],
) -> None:
    """Refuse rows that are longer than the context, and a prefix that leaves them no room.

    Args:
        model: the base; its weights are not needed.
        plan: what the method does.
        method: its name, for the message.
        data: the examples of the run, None where there are none.

    Raises:
        DataError: the longest row alone is more than the context.
        SpecError: the longest row and the special positions are more than the context.
    """
    context = num_positions(model)
    if context is None:
        return
    rows = (row for examples in data if examples is not None for row in examples)
    longest = max((_length(row) for row in rows), default=0)
    if longest > context:
        raise DataError(
            "the longest row does not fit into the model's context",
            where="data",
            expected=f"at most {context:,} tokens",
            found=f"{longest:,} tokens",
            remedy=f"cut or drop long rows with data.max_length: {context - plan.extra_positions} "
            "(and data.on_too_long), or take a model with a longer context",
        )
    if longest + plan.extra_positions > context:
        raise SpecError(
            "the longest row and the special positions do not fit into the model's context",
            where=f"{method}.prefix and {method}.infix",
            expected=f"at most {context:,} positions",
            found=f"{longest:,} tokens + {plan.extra_positions:,} special positions",
            remedy="take fewer of them, or lower data.max_length",
        )


def _length(row: Sized) -> int:
    """Positions of the longest sequence that the model sees of a row."""
    if isinstance(row, Judged):
        return max(len(answer.example) for answer in row.answers)
    return len(row)
