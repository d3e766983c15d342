"""The loss of some rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lorakit.layers.chunked_loss import chunked_cross_entropy


@dataclass(frozen=True, slots=True)
class LossShare:
    """Rows of a batch, one behind the other, that have a loss of their own.

    Attributes:
        num_rows: how many.
        num_items: what their summed loss is divided by; None: their labels.
        label_smoothing: share of the target spread over the vocabulary.
    """

    num_rows: int
    num_items: Tensor | int | None = None
    label_smoothing: float = 0.0

    def loss(self, states: Tensor, targets: Tensor, head: Sequence[Tensor | None] | None) -> Tensor:
        """Their cross-entropy, a float32 scalar with gradient.

        Args:
            states: at their labels: logits (n, vocabulary), or what the head reads (n, hidden).
            targets: (n,) int64.
            head: weight and bias of a frozen head; None where `states` are logits.
        """
        smoothing = self.label_smoothing
        if head is None:
            total = F.cross_entropy(states, targets, reduction="sum", label_smoothing=smoothing)
        else:
            weight, bias = head
            assert weight is not None
            total = chunked_cross_entropy(states, weight, bias, targets, label_smoothing=smoothing)
        items = self.num_items
        if items is None:
            return total / max(targets.numel(), 1)
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)
