"""Rows of an embedding that an adapter replaces: PEFT's `trainable_token_indices`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """New rows of one embedding.

    Where the embedding is tied to other modules, these use the new rows too, unless the adapter has
    rows of their own for them.

    Attributes:
        indices: the tokens, each once.
        rows: (tokens, width), their whole new rows.
    """

    indices: tuple[int, ...]
    rows: Tensor

    def on(self, weight: Tensor) -> Tensor:
        """The weight (vocabulary, width) with the new rows, a copy in its own dtype."""
        index = self.index(weight)
        return weight.detach().index_copy(0, index, self.rows.to(weight))

    def change(self, weight: Tensor) -> Tensor:
        """What the rows change, (tokens, width), float32 or wider, on the CPU."""
        before = weight.detach()[self.index(weight)].cpu()
        wide = before.float() if before.itemsize < 4 else before
        return self.rows.to(wide.dtype) - wide

    def index(self, weight: Tensor) -> Tensor:
        """The tokens as an index into the weight's first axis."""
        return torch.tensor(self.indices, dtype=torch.int64, device=weight.device)
