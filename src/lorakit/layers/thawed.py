"""A merge into a 4-bit layer: the sum is kept dense."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lorakit.layers.adapted import AdaptedLayer
from lorakit.weights.nf4 import FourBitWeight, QuantizedLinear


class ThawedWeight:
    """The weight of an adapted 4-bit layer, written as a dense layer in its place.

    `write` puts an ordinary nn.Linear under the wrapper and leaves the 4-bit layer untouched, so
    `restore` brings that very module back.

    Args:
        layer: the wrapper around the 4-bit layer.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self._layer = layer

    def read(self) -> Tensor:
        """The weight multiplied out, (out, in) float32."""
        return FourBitWeight(self._layer.base).read()

    def write(self, weight: Tensor) -> None:
        """Put a dense layer with this weight (out, in) in place, in the dtype computed in."""
        self._layer.base = thawed(self._layer.base, weight)

    def keep(self) -> nn.Module:
        """The 4-bit layer itself."""
        return self._layer.base

    def restore(self, kept: object) -> None:
        """Put the kept layer back."""
        if not isinstance(kept, nn.Module):
            raise TypeError(f"expected the module that keep() returned, found {type(kept)}")
        self._layer.base = kept

    def kept_bytes(self) -> int:
        """Size of the 4-bit weight that stays beside the dense one, in bytes."""
        return FourBitWeight(self._layer.base).num_bytes()


def thawed(layer: nn.Module, weight: Tensor | None = None) -> nn.Linear:
    """A dense layer in place of a 4-bit one; the bias is the same parameter.

    Args:
        layer: a Linear4bit; not changed.
        weight: (out, in), any floating dtype; None for the layer's own, multiplied out.
    """
    stored = FourBitWeight(layer)
    dense = stored.read() if weight is None else weight
    quantized = cast(QuantizedLinear, layer)
    with torch.device("meta"):
        linear = nn.Linear(quantized.in_features, quantized.out_features, bias=False)
    linear.weight = nn.Parameter(dense.to(stored.dtype()), requires_grad=False)
    linear.bias = cast(nn.Linear, layer).bias
    return linear.train(layer.training)
