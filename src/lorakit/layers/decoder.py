"""One autograd function for a whole decoder layer of the Llama family on a packed batch.

    n = norm1(x);  q, k, v = n Wq, n Wk, n Wv;  o = attention(rotate(q), rotate(k), v)
    m = x + o Wo
    n = norm2(m);  out = m + (silu(n Wg) * (n Wu)) Wd

each W a frozen weight with, or without, a low-rank update. Composed of modules, such a layer keeps
for its backward pass what every operation in it wants to have. Here x, q, k, v, o, m and the two
halves of the MLP are kept, each once; norms, activations and rotations are computed again. Layers
on one input share it, and their A are one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.layers.packed import Packing
from lorakit.layers.rms_norm import inverse_rms, norm_backward, norm_forward


@dataclass(frozen=True, slots=True)
class Product:
    """A frozen linear layer: its weight (out, in), its bias, and the scaling of its update.

    `scaling` is None where nothing is added.
    """

    weight: Tensor
    bias: Tensor | None
    scaling: float | None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the function has to know of a layer, without the factors of its updates.

    Attributes:
        products: q, k, v, o, gate, up, down.
        norms: the weights (hidden,) of the two norms.
        eps: of the two norms.
        heads: query heads.
        groups: key heads.
        scale: what the scores are multiplied by.
        dtype: what the products are computed in.
    """

    products: tuple[Product, ...]
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    heads: int
    groups: int
    scale: float
    dtype: torch.dtype


# The products that have their input in common.
_GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))


def decoder_layer(
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    packing: Packing,
    shape: LayerShape,
    factors: list[Tensor],
) -> Tensor:
    """The layer's output, with gradients for x and the factors.

    Args:
        x: (1, num_tokens, hidden).
        rotary: cosine and sine of each token's angles, (1, num_tokens, d), the two halves alike.
        packing: which tokens see which.
        shape: the layer.
        factors: A (r, in) and B (out, r) of each product that has an update, in their order.

    Returns:
        Like x.
    """
    half = rotary[0].shape[-1] // 2
    cos, sin = (angle[0, :, None, :half].to(shape.dtype) for angle in rotary)
    with torch.autocast(x.device.type, enabled=False):
        return _DecoderLayer.apply(x, cos, sin, packing, shape, *factors)  # pyright: ignore[reportReturnType]


class _Group:
    """The products on one input, and their updates: s B (A x)."""

    def __init__(self, shape: LayerShape, index: int, factors: list[Tensor | None]) -> None:
        self.dtype = shape.dtype
        self.members = [shape.products[i] for i in _GROUPS[index]]
        downs = [factors[2 * i] for i in _GROUPS[index]]
        ups = [factors[2 * i + 1] for i in _GROUPS[index]]
        self.ranks = [0 if A is None else A.shape[0] for A in downs]
        present = [A.to(self.dtype) for A in downs if A is not None]
        self.down = torch.cat(present) if len(present) > 1 else next(iter(present), None)
        self.ups = [
            None if B is None or p.scaling is None else B.to(self.dtype) * p.scaling
            for B, p in zip(ups, self.members, strict=True)
        ]
        self.kinds = [(None if A is None else A.dtype) for A in downs]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The outputs, and A x of all updates, (n, sum of r)."""
        hidden = None if self.down is None else x @ self.down.T
        found: list[Tensor] = []
        for product, up, part in zip(self.members, self.ups, self._split(hidden), strict=True):
            bias = None if product.bias is None else product.bias.to(self.dtype)
            y = F.linear(x, product.weight.to(self.dtype), bias)
            if up is not None and part is not None:
                y.addmm_(part, up.T)
            found.append(y)
        return found, hidden

    def backward(
        self, x: Tensor, hidden: Tensor | None, dys: list[Tensor], *, needs_dx: bool = True
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, and of A and B of each product."""
        dx: Tensor | None = None
        if needs_dx:
            dx = dys[0] @ self.members[0].weight.to(self.dtype)
            for dy, product in zip(dys[1:], self.members[1:], strict=True):
                dx.addmm_(dy, product.weight.to(self.dtype))
        if self.down is None or hidden is None:
            return dx, [None, None] * len(dys)
        g = torch.empty_like(hidden)
        grads: list[Tensor | None] = []
        parts = zip(dys, self.ups, self.members, self._split(hidden), self._split(g), strict=True)
        for dy, up, product, part, own in parts:
            if up is None or part is None or own is None or product.scaling is None:
                grads.append(None)
                continue
            torch.mm(dy, up, out=own)
            # As (A x)^T dy and not dy^T (A x): the narrow factor is the one to be transposed.
            grads.append((part.T @ dy).T * product.scaling)
        if dx is not None:
            dx.addmm_(g, self.down)
        downs = (g.T @ x).split(self.ranks)
        found: list[Tensor | None] = []
        for rank, kind, *both in zip(self.ranks, self.kinds, downs, grads, strict=True):
            known = rank and kind is not None
            found += [d.to(kind) if known and d is not None else None for d in both]
        return dx, found

    def _split(self, hidden: Tensor | None) -> list[Tensor | None]:
        if hidden is None:
            return [None] * len(self.ranks)
        return list(hidden.split(self.ranks, dim=1))


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        packing: Packing,
        shape: LayerShape,
        *factors: Tensor,
    ) -> Tensor:
        flat = x[0]
        every = _every_factor(shape, factors)
        qkv, out, gate_up, down = (_Group(shape, i, every) for i in range(len(_GROUPS)))
        r1 = inverse_rms(flat, shape.eps[0])
        (q, k, v), h1 = qkv.forward(norm_forward(flat, r1, shape.norms[0]).to(shape.dtype))
        q, k = (_rotate(_heads(t, n), cos, sin) for t, n in ((q, shape.heads), (k, shape.groups)))
        v = _heads(v, shape.groups)
        o, weights = _attend(q, k, v, packing, shape.scale)
        (y,), h2 = out.forward(o)
        mid = flat + y
        r2 = inverse_rms(mid, shape.eps[1])
        (gate, up), h3 = gate_up.forward(norm_forward(mid, r2, shape.norms[1]).to(shape.dtype))
        (z,), h4 = down.forward(F.silu(gate).mul_(up))
        result = mid + z if z.dtype != mid.dtype else z.add_(mid)
        ctx.save_for_backward(
            flat, r1, cos, sin, q, k, v, o, mid, r2, gate, up, h1, h2, h3, h4, *factors, *weights
        )
        ctx.packing, ctx.shape, ctx.num_factors = packing, shape, len(factors)
        return torch.ops.aten._unsafe_view(result, x.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: a checkpoint gives each of them out once
        flat, r1, cos, sin, q, k, v, o, mid, r2, gate, up, h1, h2, h3, h4 = kept[:16]
        rest = kept[16:]
        factors, weights = rest[: ctx.num_factors], rest[ctx.num_factors :]
        shape: LayerShape = ctx.shape
        every = _every_factor(shape, factors)
        qkv, out, gate_up, down = (_Group(shape, i, every) for i in range(len(_GROUPS)))
        dy = grads[0].reshape(mid.shape)

        activated = F.silu(gate)
        d, grads_down = down.backward(activated * up, h4, [dy.to(shape.dtype)])
        assert d is not None
        d_up = activated.mul_(d)
        d_gate = torch.ops.aten.silu_backward(d.mul_(up), gate)
        n = norm_forward(mid, r2, shape.norms[1]).to(shape.dtype)
        d, grads_gate_up = gate_up.backward(n, h3, [d_gate, d_up])
        assert d is not None
        d_mid = norm_backward(d.to(mid.dtype), mid, r2, shape.norms[1]).add_(dy)

        d, grads_out = out.backward(o, h2, [d_mid.to(shape.dtype)])
        assert d is not None
        dq, dk, dv = _attend_backward(d, (q, k, v), weights, ctx.packing, shape.scale)
        backwards = [_rotate(dq, cos, -sin).flatten(1), _rotate(dk, cos, -sin).flatten(1)]
        needs_dx = ctx.needs_input_grad[0]
        n = norm_forward(flat, r1, shape.norms[0]).to(shape.dtype)
        d, grads_qkv = qkv.backward(n, h1, [*backwards, dv.flatten(1)], needs_dx=needs_dx)
        dx = None
        if d is not None:
            dx = norm_backward(d.to(flat.dtype), flat, r1, shape.norms[0]).add_(d_mid)[None]
        found = [*grads_qkv, *grads_out, *grads_gate_up, *grads_down]
        return (dx, None, None, None, None, *_of_updates(shape, found))


def _every_factor(shape: LayerShape, factors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """A and B of all products, None for those without an update."""
    left = iter(factors)
    pairs = [
        (None, None) if p.scaling is None else (next(left), next(left)) for p in shape.products
    ]
    return [factor for pair in pairs for factor in pair]


def _of_updates(shape: LayerShape, found: list[Tensor | None]) -> list[Tensor | None]:
    return [d for i, d in enumerate(found) if shape.products[i // 2].scaling is not None]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, heads, d) turned by the angles of each token, (n, 1, d / 2); backwards with -sin."""
    turned = torch.empty_like(x)
    (a, b), (first, second) = x.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return turned


def _attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """(n, heads * d), and the attention weights of each block."""
    mixed, kept = torch.empty_like(q), []
    for block in packing.blocks:
        queries = block.queries(q, k.shape[1]) * scale
        scores = torch.bmm(queries, block.keys(k).transpose(1, 2))
        block.hide(scores)
        weights = scores.softmax(-1)
        block.place_queries(torch.bmm(weights, block.keys(v)), mixed)
        kept.append(weights)
    return mixed.flatten(1), kept


def _attend_backward(
    d: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: list[Tensor],
    packing: Packing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs
    # A key belongs to several blocks: their shares are added in full precision.
    wide = torch.promote_types(k.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
    d = d.view(q.shape)
    for block, kept in zip(packing.blocks, weights, strict=True):
        do = block.queries(d, k.shape[1], zero_behind=True)
        block.add_keys(torch.bmm(kept.transpose(1, 2), do), dv)
        scores = torch.bmm(do, block.keys(v).transpose(1, 2))
        scores = torch._softmax_backward_data(scores, kept, -1, kept.dtype)
        block.place_queries(torch.bmm(scores, block.keys(k)).mul_(scale), dq)
        queries = block.queries(q, k.shape[1]) * scale
        block.add_keys(torch.bmm(scores.transpose(1, 2), queries), dk)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
