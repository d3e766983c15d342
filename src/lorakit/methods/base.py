"""What every way of adapting a model can do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TrainableReport:
    """What a method trains on this model.

    Attributes:
        num_trainable: learned numbers.
        num_total: all numbers of the model with the method on it, tied weights counted once.
        sites: names of what is changed, in the model's order.
        notes: what the user should know, one sentence each.
        kept_bytes: memory that `Method.disabled` needs for what the base was, in bytes.
        extra_positions: positions of the model's context that every row takes beside its tokens.
        in_base_dtype: parameters of the base are learned in the dtype it is loaded in.
        ranks: site -> rank, of a method that has ranks.
    """

    num_trainable: int
    num_total: int
    sites: tuple[str, ...]
    notes: tuple[str, ...] = ()
    kept_bytes: int = 0
    extra_positions: int = 0
    in_base_dtype: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def share(self) -> float:
        """Learned numbers over all numbers."""
        return self.num_trainable / self.num_total


class Method(Protocol):
    """One way of adapting a model; `attach` comes before everything but `options` and `plan`."""

    @property
    def name(self) -> str:
        """Its name in a configuration."""
        ...

    def options(self) -> dict[str, Any]:
        """JSON values; `build_method(name, options)` makes the same method again."""
        ...

    def plan(self, model: nn.Module) -> TrainableReport:
        """What `attach` will do; changes nothing and works on the meta device.

        Raises:
            SpecError, TargetError: the method cannot do this on this model, with the reason.
        """
        ...

    def attach(self, model: nn.Module) -> TrainableReport:
        """Make the model trainable this way, and nothing else of it; mutates it.

        The model's output stays as it was where the method's definition allows that (a prefix
        changes it at once).
        """
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The learned tensors by name, on their device, not copied."""
        ...

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put learned tensors back in place, strictly; the inverse of `state`.

        Raises:
            AdapterFileError: the state is not this method's, all differences listed.
        """
        ...

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The optimizer's groups, as torch.optim takes them: "params" and perhaps "lr"."""
        ...

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the model is the base, bit for bit."""
        ...

    def merge(self, model: nn.Module) -> None:
        """Fold what was learned into ordinary weights of the base's class; mutates the model.

        Raises:
            MergeError: this method has no such form, with the reason.
        """
        ...

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write what was learned as a directory, whole or not at all; replaces an earlier one."""
        ...


def one_group(method: Method, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """`param_groups` of a method that learns everything at one rate."""
    learned = [tensor for tensor in method.state(model).values() if tensor.requires_grad]
    return [{"params": learned, "lr": lr}]
