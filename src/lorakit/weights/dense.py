"""A weight stored as an ordinary floating-point parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseWeight:
    """The parameter `module.weight`.

    `write` puts a new parameter in place of the old one and leaves the old one untouched: what else
    holds the old parameter (an output head tied to an embedding) keeps its values, and `restore`
    brings the very object back, so that the tie is whole again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def read(self) -> Tensor:
        """The weight, (out, in) or the layer's own layout, in its stored dtype."""
        return self._parameter().detach()

    def write(self, weight: Tensor) -> None:
        """Store `weight`, rounded to the stored dtype."""
        old = self._parameter()
        new = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
        self._module.register_parameter("weight", new)

    def keep(self) -> nn.Parameter:
        """The present parameter itself."""
        return self._parameter()

    def restore(self, kept: object) -> None:
        """Put the kept parameter back."""
        if not isinstance(kept, nn.Parameter):
            raise TypeError(f"expected the parameter that keep() returned, found {type(kept)}")
        self._module.register_parameter("weight", kept)

    def kept_bytes(self) -> int:
        """Size of the original that stays beside the written one, in bytes."""
        parameter = self._parameter()
        return parameter.numel() * parameter.element_size()

    def _parameter(self) -> nn.Parameter:
        parameter = self._module.weight
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"{type(self._module).__name__}.weight is not a parameter")
        return parameter


def is_dense(module: nn.Module) -> bool:
    """Whether the module's weight is an ordinary floating-point parameter."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(weight, torch.nn.Parameter) and weight.is_floating_point()
