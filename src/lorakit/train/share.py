"""The one definition of how much of a model is trained."""

from __future__ import annotations


def trained_share(num_trained: int, num_base: int) -> float:
    """Learned numbers over all numbers of the model with its adapter: n / (base + n)."""
    return num_trained / (num_base + num_trained)
