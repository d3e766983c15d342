"""Cross-entropy of hidden states under a frozen output head, with the logits made in chunks.

The logits, (labels x vocabulary) in float32, and their gradient are the largest tensors of a step.
Here a chunk of them is made, its loss and the gradient of its hidden states are taken, and it is
forgotten:

    loss = sum over labels of w ((1 - e) (lse - z_t) + e (lse - mean z)),   z = h W^T + b
    dloss/dh = w (softmax(z) - (1 - e) onehot(t) - e / V) W
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Labels of a chunk: on a CPU enough for a product to be at its best, as the logits are gone through
# several times and should stay in the cache; elsewhere enough to fill the device (128 MiB).
_CHUNK_LABELS = 64
_CHUNK_LOGITS = 1 << 25


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The sum of the cross-entropies, a float32 scalar, with a gradient for `hidden` alone.

    Args:
        hidden: (n, hidden size).
        weight: (vocabulary, hidden size), frozen.
        bias: (vocabulary,), frozen, or None.
        targets: (n,) int64.
        label_smoothing: e, the share of the target that is spread over the vocabulary.
        weights: w, (n,) float32 without gradient; None for 1.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(  # pyright: ignore[reportReturnType]
            hidden, weight, bias, targets, label_smoothing, weights
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        weights: Tensor | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = _chunk_size(hidden.device.type, weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            part, wanted = hidden[start : start + size], targets[start : start + size, None]
            logits = F.linear(part, weight, bias).float()
            lse = logits.logsumexp(-1, keepdim=True)
            counts = None if weights is None else weights[start : start + size, None]
            loss = _summed(lse - logits.gather(1, wanted), counts) * (1 - smoothing)
            if smoothing:
                spread = lse - logits.mean(-1, keepdim=True)
                loss = loss + _summed(spread, counts) * smoothing
            total += loss
            if gradient is not None:
                slope = logits.sub_(lse).exp_()
                wanted_slope = torch.full_like(lse, smoothing - 1.0)
                slope.scatter_add_(1, wanted, wanted_slope)
                if smoothing:
                    slope.sub_(smoothing / weight.shape[0])
                if counts is not None:
                    slope.mul_(counts)
                torch.mm(slope.to(weight.dtype), weight, out=gradient[start : start + size])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None, None


def _summed(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (values * weights).sum()


def _chunk_size(device: str, vocabulary: int) -> int:
    return _CHUNK_LABELS if device == "cpu" else max(_CHUNK_LABELS, _CHUNK_LOGITS // vocabulary)
