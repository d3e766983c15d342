"""The number in front of BA."""

from __future__ import annotations

import math
from typing import Literal

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]


def lora_scaling(alpha: float, r: int, rule: Scaling) -> float:
    """The factor s of h = W0 x + s BA x.

    Args:
        alpha: the numerator.
        r: the rank.
        rule: "alpha/r" (Hu et al. 2021) or "alpha/sqrt(r)" (rsLoRA, Kalajdzievski 2023).
    """
    return alpha / math.sqrt(r) if rule == "alpha/sqrt(r)" else alpha / r


def alpha_for(scaling: float, r: int, rule: Scaling) -> float:
    """The alpha that gives `scaling` at rank `r`: the inverse of `lora_scaling`."""
    return scaling * math.sqrt(r) if rule == "alpha/sqrt(r)" else scaling * r
