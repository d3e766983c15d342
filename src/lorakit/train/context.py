"""Whether the rows of a run fit into the model's context with what a method puts beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sized

from transformers import PretrainedConfig

from lorakit.errors import SpecError
from lorakit.methods.base import TrainableReport


def require_context(
    config: PretrainedConfig,
    plan: TrainableReport,
    method: str,
    data: Iterable[Iterable[Sized] | None],
) -> None:
    """Refuse a prefix that leaves no room for the longest row.

    Args:
        config: of the base.
        plan: what the method does.
        method: its name, for the message.
        data: the examples of the run, None where there are none.

    Raises:
        SpecError: the longest row and the special positions are more than the context.
    """
    # Absent for ALiBi (BLOOM), which has no end.
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not plan.extra_positions or context is None:
        return
    longest = max(
        (len(row) for examples in data if examples is not None for row in examples), default=0
    )
    if longest + plan.extra_positions > context:
        raise SpecError(
            "the longest row and the special positions do not fit into the model's context",
            where=f"{method}.prefix and {method}.infix",
            expected=f"at most {context:,} positions",
            found=f"{longest:,} tokens + {plan.extra_positions:,} special positions",
            remedy="take fewer of them, or lower data.max_length",
        )
