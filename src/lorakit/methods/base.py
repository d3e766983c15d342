"""What every way of adapting a model can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TrainableReport:
    """What a method trains on this model.

    Attributes:
        num_trainable: learned numbers.
        num_total: all numbers of the model, the learned ones included.
        sites: names of what is changed, in the model's order.
        notes: what the user should know, one sentence each.
    """

    num_trainable: int
    num_total: int
    sites: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Learned numbers over all numbers."""
        return self.num_trainable / self.num_total


class Method(Protocol):
    """One way of adapting a model."""

    name: str

    def attach(self, model: nn.Module) -> TrainableReport:
        """Make the model trainable this way; mutates it and leaves its output as it was."""
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The learned tensors by name, on their device, not copied."""
        ...

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put learned tensors back in place, strictly; the inverse of `state`."""
        ...

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write what was learned as a directory that other tools load; replaces an earlier one."""
        ...
