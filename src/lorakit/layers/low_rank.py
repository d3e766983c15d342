"""The learned part of one adapter at one layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers.kinds import LayerKind
from lorakit.layers.rows import Rows


class LowRank(nn.Module):
    """One update s B A, of a whole layer or of one part of a fused projection.

    Args:
        lora_A: (r, in) or the kind's shape, float32 as a rule.
        lora_B: (out, r) or the kind's shape; out is the part's own size.
        scaling: s, alpha/r or alpha/sqrt(r).
        dropout: probability on the branch's input, active in train mode.
        rows: the output rows the part owns; None for the whole layer.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout
        self.rows = rows

    def branch(self, kind: LayerKind, base: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """S B A x over the whole output, in `dtype` (the activations').

        The factors stay as they are stored; copies of them, not of the activations, are cast.
        """
        if self.training and self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        y = kind.branch(base, x, self.lora_A.to(dtype), self.lora_B.to(dtype) * self.scaling)
        return y if self.rows is None else self.rows.spread(y)

    def delta(self, kind: LayerKind) -> Tensor:
        """S B A in float32, in the layout of the whole base weight."""
        return whole_delta(kind, self.lora_A, self.lora_B, self.rows) * self.scaling

    def extra_repr(self) -> str:
        """Rank and scaling, for print(model)."""
        part = "" if self.rows is None else f", rows={self.rows.size} of {self.rows.whole}"
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}{part}"


def whole_delta(kind: LayerKind, A: Tensor, B: Tensor, rows: Rows | None) -> Tensor:
    """B A over the whole base weight, float32, without the scaling.

    Args:
        kind: the geometry.
        A: (r, in) or the kind's shape, any dtype.
        B: (out, r) or the kind's shape; out is the part's size where `rows` is given.
        rows: the part's rows of a fused projection, or None.
    """
    wide_B = B.detach().float() if rows is None else rows.spread(B.detach().float().T).T
    return kind.delta(A.detach().float(), wide_B)


class Branch(nn.Module):
    """Everything one adapter does at one layer: its parts, and its bias if it trains one.

    Args:
        parts: one LowRank, or one per adapted part of a fused projection.
        bias: (out,) the trained bias that takes the base's place, or None.
    """

    def __init__(self, parts: list[LowRank], bias: Tensor | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bias = None if bias is None else nn.Parameter(bias)

    def updates(self) -> list[LowRank]:
        """The parts, typed."""
        return [part for part in self.parts if isinstance(part, LowRank)]
