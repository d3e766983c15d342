"""How good a validation is: one order for checkpoints, learning rates and the arms of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorakit.train.objectives.base import LOSS

Merit = tuple[float, float]


def merit(found: Mapping[str, Any], by: str) -> Merit | None:
    """How good a validation is beside others of the same rows; higher is better.

    Args:
        found: its numbers: `eval_loss`, and `eval_NAME` of every metric of the task.
        by: "loss", or the metric that decides (higher is better); of equal metrics the lower loss
            is better.

    Returns:
        What decides, then the negative loss; None where a number is missing or not finite.
    """
    loss = found.get("eval_loss")
    value = found.get(f"eval_{by}")
    if loss is None or value is None or not (math.isfinite(loss) and math.isfinite(value)):
        return None
    return (-loss if by == LOSS else value), -loss


def merit_name(by: str) -> str:
    """What decides, as tables and messages call it."""
    return "validation loss" if by == LOSS else f"validation {by}"
