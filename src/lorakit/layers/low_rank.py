"""The learned part of one adapter at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lorakit.errors import StateError
from lorakit.layers.kinds import LayerKind, as_matrix, from_matrix
from lorakit.layers.norm_cache import NormCache
from lorakit.layers.rows import Rows
from lorakit.math.dora import dora_change


class Host(Protocol):
    """What an update needs of the layer it changes."""

    base: nn.Module
    kind: LayerKind


class UpdateRule(Protocol):
    """How A and B (and what else is learned) change the layer: LoRA, DoRA."""

    name: str

    def change(self, update: LowRank, host: Host, x: Tensor, y: Tensor) -> Tensor:
        """What the update adds to the base's output y = W0 x + b, same shape and dtype.

        Args:
            update: the learned tensors.
            host: the layer they belong to.
            x: the layer's input.
            y: the base's output for it.
        """
        ...


@dataclass(frozen=True, slots=True)
class UpdateValues:
    """The values of one update, of a live layer or of a file, and what they mean for the weight.

    Attributes:
        kind: the geometry.
        A: (r, in) or the kind's shape.
        B: (out, r) or the kind's shape; out is the part's size where `rows` is given.
        scaling: s.
        rows: the part's rows of a fused projection, or None.
        magnitude: DoRA's m, (out,), or None for LoRA.
    """

    kind: LayerKind
    A: Tensor
    B: Tensor
    scaling: float
    rows: Rows | None = None
    magnitude: Tensor | None = None

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change of the whole base weight, float32 or wider, in its layout.

        Args:
            weight: W0 in the base's layout; LoRA's change s B A does not depend on it, DoRA's does.

        Raises:
            ValueError: a DoRA update without `weight`.
        """
        if self.magnitude is None:
            return whole_delta(self.kind, self.A, self.B, self.rows).mul_(self.scaling)
        if weight is None:
            raise ValueError("the change that DoRA makes depends on the base weight")
        matrix = as_matrix(self.kind, weight)
        change = dora_change(
            take_rows(matrix, self.rows),
            self.A.flatten(1).to(weight.device),
            self.B.flatten(1).to(weight.device),
            scaling=self.scaling,
            magnitude=self.magnitude.to(weight.device),
        )
        whole = change if self.rows is None else self.rows.spread(change.T).T
        return from_matrix(self.kind, whole, tuple(weight.shape))

    def delta_block(self, block: slice) -> Tensor:
        """A block of the change along the weight's first axis, float32; LoRA alone.

        Args:
            block: indices of the first axis of the base weight.
        """
        down, up = self.A.detach().float(), _whole_B(self.B, self.rows)
        if self.kind.weight_axis == 0:
            change = self.kind.delta(down, up[block])
        else:
            change = self.kind.delta(down[:, block], up)
        return change.mul_(self.scaling)


def take_rows(matrix: Tensor, rows: Rows | None) -> Tensor:
    """The part's rows of a matrix (out, in), or all of it."""
    return matrix if rows is None else rows.take(matrix.T).T


def whole_delta(kind: LayerKind, A: Tensor, B: Tensor, rows: Rows | None) -> Tensor:
    """B A over the whole base weight, float32, without the scaling.

    Args:
        kind: the geometry.
        A: (r, in) or the kind's shape, any dtype.
        B: (out, r) or the kind's shape; out is the part's size where `rows` is given.
        rows: the part's rows of a fused projection, or None.
    """
    return kind.delta(A.detach().float(), _whole_B(B, rows))


def _whole_B(B: Tensor, rows: Rows | None) -> Tensor:
    """B of the whole layer, float32: zero outside of the part's rows."""
    wide = B.detach().float()
    return wide if rows is None else rows.spread(wide.T).T


class LowRank(nn.Module):
    """One update of a whole layer or of one part of a fused projection.

    Args:
        lora_A: (r, in) or the kind's shape, float32 as a rule.
        lora_B: (out, r) or the kind's shape; out is the part's own size.
        scaling: s, alpha/r or alpha/sqrt(r).
        rule: what the tensors mean.
        dropout: probability on the branch's input, active in train mode.
        rows: the output rows the part owns; None for the whole layer.
    """

    start_A: Tensor | None
    start_B: Tensor | None
    under_A: Tensor | None
    under_B: Tensor | None
    under_scaling = 1.0
    awaits_data = False

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        scaling: float,
        rule: UpdateRule,
        dropout: float = 0.0,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.magnitude: nn.Parameter | None = None
        self.singular: nn.Parameter | None = None
        # The table itself: a model has hundreds of updates, and loading one adapter makes them all.
        self._buffers.update(dict.fromkeys(("start_A", "start_B", "under_A", "under_B")))
        self.scaling = scaling
        self.rule = rule
        self.dropout = dropout
        self.rows = rows
        self.norms = NormCache()

    @property
    def plain(self) -> bool:
        """Whether the update is s B A x and nothing else, so that products can be fused."""
        return self.magnitude is None and self.start_B is None and not self.awaits_data

    @property
    def fusable(self) -> bool:
        """Whether it is plain, and sees the layer's input itself: no dropout in this mode."""
        return self.plain and not (self.training and self.dropout)

    def start_here(self) -> None:
        """Take the present factors as (A0, B0): from now on the update is B A - B0 A0.

        The base stays W0: what a method like PiSSA trains against, W0 - s B0 A0, is never written
        into the weight, so that other adapters, and none, still run on W0.
        """
        self.start_A = self.lora_A.detach().clone()
        self.start_B = self.lora_B.detach().clone()

    def put_on(self, A: Tensor, B: Tensor, scaling: float) -> None:
        """Take a frozen update beneath: from now on the update is s B A + s1 B1 A1.

        Args:
            A: A1, (r1, in) or the kind's shape; copied to where lora_A is.
            B: B1, (out, r1) or the kind's shape.
            scaling: s1.
        """
        under_A = self.lora_A.new_empty((A.shape[0], *self.lora_A.shape[1:]))
        under_B = self.lora_B.new_empty((self.lora_B.shape[0], A.shape[0], *self.lora_B.shape[2:]))
        if not under_A.is_meta:
            under_A.copy_(A)
            under_B.copy_(B)
        self.under_A, self.under_B, self.under_scaling = under_A, under_B, scaling

    @property
    def down(self) -> Tensor:
        """A as the product uses it: lora_A, or diag(lambda) lora_A where the values are learned.

        AdaLoRA's P diag(lambda) Q is B A with B = P and A = diag(lambda) Q, so that every way of
        computing B A computes it too.
        """
        if self.singular is None:
            return self.lora_A
        return self.lora_A * self.singular.view(-1, *[1] * (self.lora_A.ndim - 1))

    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """A, B and scaling of each product that a plain update is the sum of."""
        found: list[tuple[Tensor, Tensor, float]] = [(self.down, self.lora_B, self.scaling)]
        if self.under_A is not None and self.under_B is not None:
            found.append((self.under_A, self.under_B, self.under_scaling))
        return found

    def change(self, host: Host, x: Tensor, y: Tensor) -> Tensor:
        """What this update adds to the base's output y, in y's dtype.

        Raises:
            StateError: training was begun before the data that the factors start from was seen.
        """
        if self.awaits_data and self.training:
            raise StateError(
                "this adapter starts from data, and has seen none",
                remedy="initialise_from_data(model, name, batches) before training",
            )
        return self.rule.change(self, host, x, y)

    def branch(self, host: Host, x: Tensor, B: Tensor) -> Tensor:
        """B A x over the whole output, in the dtype of the activations, for any B.

        The factors stay as they are stored; copies of them, not of the activations, are cast.

        Args:
            host: the layer.
            x: its input, dropout applied.
            B: lora_B times whatever the rule puts in front, already in the activations' dtype.
        """
        y = host.kind.branch(host.base, x, self.down.to(B.dtype), B)
        return y if self.rows is None else self.rows.spread(y)

    def start_branch(self, host: Host, x: Tensor, scale: Tensor | float) -> Tensor | None:
        """B0 A0 x times `scale` (a number, or one per output of the part), or None without a start.

        Computed as `branch` computes B A x, so that the two cancel to the last bit at the start.
        """
        return self._frozen_branch(host, x, (self.start_A, self.start_B), scale)

    def under_branch(self, host: Host, x: Tensor) -> Tensor | None:
        """s1 B1 A1 x of what lies beneath, or None where nothing does."""
        return self._frozen_branch(host, x, (self.under_A, self.under_B), self.under_scaling)

    def _frozen_branch(
        self,
        host: Host,
        x: Tensor,
        factors: tuple[Tensor | None, Tensor | None],
        scale: Tensor | float,
    ) -> Tensor | None:
        A, B = factors
        if A is None or B is None:
            return None
        dtype = activation_dtype(x, A)
        y = host.kind.branch(host.base, x, A.to(dtype), scaled_rows(B, scale, dtype))
        return y if self.rows is None else self.rows.spread(y)

    def effective(self) -> tuple[Tensor, Tensor]:
        """The factors of the whole update at its scaling s.

        A and B; with a start [A; A0] and [B, -B0]; with an update beneath [A; A1] and
        [B, s1/s B1]; with learned singular values diag(lambda) Q and P, of the directions whose
        value is not 0 (one at least).
        """
        if self.singular is not None:
            kept = self.singular != 0
            kept[0] |= not bool(kept.any())
            return self.down[kept], self.lora_B[:, kept]
        all_A: list[Tensor] = [self.lora_A]
        all_B: list[Tensor] = [self.lora_B]
        if self.start_A is not None and self.start_B is not None:
            all_A.append(self.start_A)
            all_B.append(-self.start_B)
        if self.under_A is not None and self.under_B is not None:
            all_A.append(self.under_A)
            all_B.append(self.under_B * (self.under_scaling / self.scaling))
        if len(all_A) == 1:
            return self.lora_A, self.lora_B
        return torch.cat(all_A), torch.cat(all_B, dim=1)

    def values(self, kind: LayerKind) -> UpdateValues:
        """The learned tensors, live, with what is needed to apply them to a weight."""
        A, B = self.effective()
        return UpdateValues(
            kind=kind,
            A=A,
            B=B,
            scaling=self.scaling,
            rows=self.rows,
            magnitude=self.magnitude,
        )

    def train(self, mode: bool = True) -> LowRank:
        """Training changes the factors, so nothing computed from them outlives a switch."""
        self.norms.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Rule, rank and scaling, for print(model)."""
        part = "" if self.rows is None else f", rows={self.rows.size} of {self.rows.whole}"
        return f"{self.rule.name}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}{part}"


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


def scaled_rows(B: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """B times one number, or one per row, in `dtype`.

    A number multiplies after the cast, as PEFT does it; a factor per row before, because a gain
    near 1 would lose its digits in a half-precision type.
    """
    if isinstance(scale, Tensor):
        return (B * scale.view(-1, *[1] * (B.ndim - 1))).to(dtype)
    return B.to(dtype) * scale


def activation_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype the branch is computed in: the activations', or the output's for token ids."""
    return x.dtype if x.is_floating_point() else y.dtype
