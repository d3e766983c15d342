"""A classifier's outputs, and the loss and predictions made of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

_NOT_FOR_THE_MODEL = frozenset({"labels", "rows"})


class Classifier:
    """Calls a sequence classifier with what its forward takes of a batch.

    Args:
        model: with a classification head; not changed.
        regression: whether its one output is a number.
    """

    def __init__(self, model: PreTrainedModel, *, regression: bool) -> None:
        self._model = model
        self._regression = regression
        self._taken = frozenset(inspect.signature(model.forward).parameters)

    def outputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The outputs in float32, (batch, classes) or, for regression, (batch,)."""
        given = {
            name: value
            for name, value in batch.items()
            if name in self._taken and name not in _NOT_FOR_THE_MODEL
        }
        # A cache is for tokens that follow, and here none does.
        cache = {"use_cache": False} if "use_cache" in self._taken else {}
        logits = self._model(**given, **cache).logits.float()
        return logits.squeeze(-1) if self._regression else logits

    def total_loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The sum over rows: cross-entropy in nats, or the squared error."""
        labels = labels.to(outputs.device)
        if self._regression:
            return F.mse_loss(outputs, labels.float(), reduction="sum")
        return F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=label_smoothing)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The likeliest class of each row, int64 (batch,), or the numbers."""
        return outputs if self._regression else torch.argmax(outputs, dim=-1)
