"""One autograd function for a frozen linear layer and the branches on it.

Composed of ordinary operations, an adapted linear layer makes the base's output, the branch's
output and their sum, and adds up two gradients of its input. Here the branch is accumulated into
the base's output and into the input's gradient by the matrix products themselves, and the input,
saved once, serves both factors:

    h = x A^T                      y = x W^T + b;  y += s h B^T
    g = s dy B                     dx = dy W;      dx += g A
    dA = g^T x                     dB = s dy^T h
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorakit.layers.low_rank import Branch

# Types of a parameter that is nothing but its numbers; the second is one without memory, which a
# planned step runs on.
_ORDINARY = ("Parameter", "FakeTensor")


@dataclass(frozen=True, slots=True)
class Part:
    """One product: its scaling, and what of the layer's output it owns.

    Attributes:
        scaling: s.
        start: the first of its output rows.
        stop: the one behind the last.
        first: the first entry (token of a row) of the batch that it runs for.
        last: the one behind the last; None: to the end.
    """

    scaling: float
    start: int
    stop: int
    first: int = 0
    last: int | None = None

    def at(self, x: Tensor) -> Tensor:
        """The part's entries of an input (n, in): a view."""
        return x[self.first : self.last]

    def of(self, y: Tensor) -> Tensor:
        """The part's entries and columns of an output (n, out): a view."""
        return y[self.first : self.last, self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a batch, one behind the other, and what one adapter does for them.

    Attributes:
        branch: the adapter's part of this layer.
        start: the first index of the batch's first axis; in a packed batch, the first token.
        stop: the one behind the last.
    """

    branch: Branch
    start: int
    stop: int


def fused_forward(base: nn.Module, branch: Branch, x: Tensor) -> Tensor | None:
    """The layer's whole output with one adapter's updates, or None where it cannot be fused.

    Args:
        base: the frozen layer.
        branch: what the adapter does there.
        x: the layer's input.
    """
    return _fused(base, [(branch, 0, None)], x)


def fused_rows(base: nn.Module, spans: Sequence[Span], x: Tensor) -> Tensor | None:
    """The layer's whole output with each span's updates, or None where it cannot be fused.

    The base's product is computed once for all rows.

    Args:
        base: the frozen layer.
        spans: which rows have which updates; rows of none have the base alone.
        x: the layer's input, rows on the first axis.
    """
    each = x.shape[1:-1].numel()
    return _fused(base, [(s.branch, s.start * each, s.stop * each) for s in spans], x)


def fused_tokens(base: nn.Module, spans: Sequence[Span], x: Tensor) -> Tensor | None:
    """`fused_rows` of a packed batch (1, tokens, in): its spans count tokens."""
    return _fused(base, [(s.branch, s.start, s.stop) for s in spans], x)


def _fused(
    base: nn.Module, owners: Sequence[tuple[Branch, int, int | None]], x: Tensor
) -> Tensor | None:
    """See `fused_rows`; entries (tokens) in place of rows."""
    frozen = frozen_parameters(base)
    if frozen is None or not x.is_floating_point() or not all(_fusable(o[0]) for o in owners):
        return None
    parts: list[Part] = []
    factors: list[Tensor] = []
    for branch, first, last in owners:
        for update in branch.updates():
            start = 0 if update.rows is None else update.rows.start
            for A, B, scaling in update.pairs():
                parts.append(Part(scaling, start, start + B.shape[0], first, last))
                factors += [A, B]
    weight, bias = frozen
    return adapted_linear(x, weight, bias, tuple(parts), factors)


def _fusable(branch: Branch) -> bool:
    if branch.bias is not None:
        return False
    return all(u.fusable and (u.rows is None or u.rows.count == 1) for u in branch.updates())


def frozen_parameters(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The (out, in) weight and the bias of a layer whose product can be fused, or None.

    Only layers whose forward is known to be x W^T + b, that nobody hooks or replaced, and whose
    parameters are frozen, ordinary tensors; every other layer takes the general path.
    """
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return None
    own = dict(base.named_parameters(recurse=False))
    ordinary = all(type(p).__name__ in _ORDINARY and not p.requires_grad for p in own.values())
    if "forward" in vars(base) or not ordinary or "weight" not in own:
        return None
    weight = own["weight"] if type(base) is nn.Linear else own["weight"].T
    return weight, own.get("bias")


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: tuple[Part, ...], factors: list[Tensor]
) -> Tensor:
    """The output x W^T + b + sum of s (x A^T) B^T, with gradients for x and the factors.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,), frozen, or None.
        parts: one for each product.
        factors: A (r, in) and B (rows of the part, r) of each part in turn, any floating dtype;
            used in the dtype of the activations; their gradients come in their own.

    Returns:
        (..., out) in the dtype F.linear(x, weight) has, autocast included.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _AdaptedLinear.apply(x, weight, bias, parts, *factors)  # pyright: ignore[reportReturnType]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[Part, ...],
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        kept: list[Tensor] = []
        for part, stored_A, stored_B in zip(parts, factors[::2], factors[1::2], strict=True):
            down, up = stored_A.to(x.dtype), stored_B.to(x.dtype)
            h = part.at(flat) @ down.T
            part.of(y).addmm_(h, up.T, alpha=part.scaling)
            kept += [down, up, h]
        ctx.save_for_backward(flat, weight, *kept)
        ctx.parts, ctx.shape = parts, x.shape
        ctx.dtypes = [factor.dtype for factor in factors]
        # Not a view: whoever gets a view out of an autograd function may not change it in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        x, weight, *kept = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        needs = ctx.needs_input_grad
        dx = dy @ weight if needs[0] else None
        found: list[Tensor | None] = []
        for i, part in enumerate(ctx.parts):
            down, up, h = kept[3 * i : 3 * i + 3]
            mine = part.of(dy)
            g = (mine @ up).mul_(part.scaling)
            if dx is not None:
                part.at(dx).addmm_(g, down)
            grad_A = (g.T @ part.at(x)).to(ctx.dtypes[2 * i]) if needs[4 + 2 * i] else None
            grad_B = None
            if needs[5 + 2 * i]:
                # As h^T dy and not dy^T h: the narrow factor is the one to be transposed.
                grad_B = (h.T @ mine).T.to(ctx.dtypes[2 * i + 1]) * part.scaling
            found += [grad_A, grad_B]
        return (None if dx is None else dx.view(ctx.shape), None, None, None, *found)
