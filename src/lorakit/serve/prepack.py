"""A second copy of the base's large weights, in the layout that products of a few rows are fast in.

A product with a weight as PyTorch keeps it begins by copying that weight into another layout, at
every step. The copy is made once here, by oneDNN, and kept: the same products up to the order of
their sums.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.environment import available_memory_bytes

_log = logging.getLogger("lorakit.serve")
# A small weight stays in the cache, where its own layout is as fast.
_LEAST_NUMBERS = 1 << 19
# Rows from which on it pays: below, float32 is as fast as memory either way.
_LEAST_ROWS = {torch.float32: 4, torch.bfloat16: 1}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest number
_HINT_ROWS = 16  # the layout is chosen for about this many rows, and taken for any number
# What is left free at least, as a share of what was: caches and adapters come after the start.
_KEPT_FREE = 0.5


class Prepacked:
    """The large linear layers of a model on a CPU, computed from copies of their weights.

    The modules stay what they are, with their weights: adapters are read against those.

    Args:
        model: its layers' forward is replaced until `undo`; nothing is done on another device, for
            other dtypes than float32 and bfloat16, without oneDNN, or where memory is short.

    Attributes:
        num_bytes: memory of the copies.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._layers: list[nn.Linear] = []
        if not torch.backends.mkldnn.is_available():
            return
        layers = [m for m in model.modules() if type(m) is nn.Linear and _gains(m)]
        needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        if not layers:
            return
        if needed > available_memory_bytes() * _KEPT_FREE:
            _log.warning("weights are not copied into a faster layout: memory is short")
            return
        try:
            copies = [_copy(layer) for layer in layers]
            agree = _agree(layers[0], copies[0])
        except RuntimeError as error:
            _log.warning("weights are not copied into a faster layout: %s", error)
            return
        if not agree:
            _log.warning("weights are not copied into a faster layout: its products are others")
            return
        for layer, copy in zip(layers, copies, strict=True):
            # On the instance: the module, its class and whoever holds it stay the same.
            layer.forward = partial(_product, layer, copy)  # pyright: ignore[reportAttributeAccessIssue]
            self._layers.append(layer)
        self.num_bytes = needed

    def undo(self) -> None:
        """Let the copies go: the layers compute from their weights again."""
        for layer in self._layers:
            del layer.forward
        self._layers, self.num_bytes = [], 0


def _gains(layer: nn.Linear) -> bool:
    """Whether its weight is large and of a kind that gains, and nobody else's hand is on it."""
    weight = layer.weight
    fast = weight.dtype in _LEAST_ROWS and (
        weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    large = weight.device.type == "cpu" and weight.numel() >= _LEAST_NUMBERS
    return fast and large and "forward" not in vars(layer)


def _copy(layer: nn.Linear) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _HINT_ROWS)


def _agree(layer: nn.Linear, copy: Tensor) -> bool:
    """Whether this processor's product from the copy is the weight's, tried with a few rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, layer.in_features, generator=generator).to(layer.weight.dtype)
    with torch.inference_mode():
        own, found = F.linear(x, layer.weight, layer.bias), _product(layer, copy, x)
    off = (own - found).abs().max() / own.abs().max().clamp_min(1e-30)
    return bool(off <= _TOLERANCE[layer.weight.dtype])


def _product(layer: nn.Linear, copy: Tensor, x: Tensor) -> Tensor:
    """X W^T + b, from the copy of W where that is faster."""
    few = x.numel() < _LEAST_ROWS[layer.weight.dtype] * x.shape[-1]
    if few or x.dtype != layer.weight.dtype or torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, copy, layer.bias, "none", [], "")
