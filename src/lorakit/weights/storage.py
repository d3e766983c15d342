"""From a module to its frozen weight, however it is stored."""

from __future__ import annotations

from torch import nn

from lorakit.weights.base import BaseWeight
from lorakit.weights.dense import DenseWeight


def base_weight(module: nn.Module, name: str = "weight") -> BaseWeight:
    """One weight of a base layer behind the protocol that its storage needs."""
    return DenseWeight(module, name)
