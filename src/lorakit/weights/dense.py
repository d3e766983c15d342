"""A weight stored as an ordinary floating-point parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseWeight:
    """One parameter of a module, `weight` unless another name is given.

    `write` puts a new parameter in place of the old one and leaves the old one untouched: what else
    holds the old parameter (an output head tied to an embedding) keeps its values, and `restore`
    brings the very object back, so that the tie is whole again.
    """

    def __init__(self, module: nn.Module, name: str = "weight") -> None:
        owner, _, leaf = name.rpartition(".")
        self._module = module.get_submodule(owner)
        self._name = leaf

    def read(self) -> Tensor:
        """The parameter in its own layout and stored dtype."""
        return self._parameter().detach()

    def write(self, weight: Tensor) -> None:
        """Store `weight`, rounded to the stored dtype."""
        old = self._parameter()
        new = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
        self._module.register_parameter(self._name, new)

    def keep(self) -> nn.Parameter:
        """The present parameter itself."""
        return self._parameter()

    def restore(self, kept: object) -> None:
        """Put the kept parameter back."""
        if not isinstance(kept, nn.Parameter):
            raise TypeError(f"expected the parameter that keep() returned, found {type(kept)}")
        self._module.register_parameter(self._name, kept)

    def kept_bytes(self) -> int:
        """Size of the original that stays beside the written one, in bytes."""
        parameter = self._parameter()
        return parameter.numel() * parameter.element_size()

    def _parameter(self) -> nn.Parameter:
        return self._module.get_parameter(self._name)


def is_dense(module: nn.Module) -> bool:
    """Whether the module's weight is an ordinary floating-point parameter."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(weight, torch.nn.Parameter) and weight.is_floating_point()
