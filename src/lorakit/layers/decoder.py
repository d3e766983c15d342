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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.layers.packed import Packing
from lorakit.layers.rms_norm import inverse_rms, norm_backward, norm_forward


@dataclass(frozen=True, slots=True)
class Product:
    """A frozen linear layer: its weight (out, in), its bias, and the scalings of its updates.

    `scalings` has one for each span of the layer, None where nothing is added.
    """

    weight: Tensor
    bias: Tensor | None
    scalings: tuple[float | None, ...]


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
        spans: the tokens [begin, end) of each adapter; None for an end: to the last.
    """

    products: tuple[Product, ...]
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    heads: int
    groups: int
    scale: float
    dtype: torch.dtype
    spans: tuple[tuple[int, int | None], ...] = ((0, None),)


T = TypeVar("T")
Pair = tuple[T, T]
# A and B of each product and span, None without an update.
Factors = Sequence[Sequence[Pair[Tensor] | None]]

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
        factors: A (r, in) and B (out, r) of each update: product by product, in each those of the
            spans, in their order.

    Returns:
        Like x.
    """
    half = rotary[0].shape[-1] // 2
    cos, sin = (angle[0, :, None, :half].to(shape.dtype) for angle in rotary)
    with torch.autocast(x.device.type, enabled=False):
        return _DecoderLayer.apply(x, cos, sin, packing, shape, *factors)  # pyright: ignore[reportReturnType]


class _Updates:
    """What one adapter adds to the products on one input, for its tokens: s B (A x)."""

    def __init__(self, shape: LayerShape, index: int, span: int, every: Factors) -> None:
        begin, end = shape.spans[span]
        self.here = slice(begin, end)
        self.scalings = [shape.products[i].scalings[span] for i in _GROUPS[index]]
        pairs = [every[i][span] for i in _GROUPS[index]]
        self.ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
        present = [pair[0].to(shape.dtype) for pair in pairs if pair is not None]
        self.down = torch.cat(present) if len(present) > 1 else next(iter(present), None)
        self.ups = [
            None if pair is None or scaling is None else pair[1].to(shape.dtype) * scaling
            for pair, scaling in zip(pairs, self.scalings, strict=True)
        ]
        self.kinds = [None if pair is None else pair[0].dtype for pair in pairs]

    def forward(self, x: Tensor, ys: list[Tensor]) -> Tensor | None:
        """Add to the outputs, in place; A x of all updates, (n, sum of r)."""
        if self.down is None:
            return None
        hidden = x[self.here] @ self.down.T
        for y, up, part in zip(ys, self.ups, self._split(hidden), strict=True):
            if up is not None:
                y[self.here].addmm_(part, up.T)
        return hidden

    def backward(
        self, x: Tensor, hidden: Tensor | None, dys: list[Tensor], dx: Tensor | None
    ) -> list[Pair[Tensor | None]]:
        """The gradients of A and B of each product; adds to that of x, in place."""
        if self.down is None or hidden is None:
            return [(None, None)] * len(dys)
        g = torch.empty_like(hidden)
        grads: list[Tensor | None] = []
        parts = zip(dys, self.ups, self.scalings, self._split(hidden), self._split(g), strict=True)
        for dy, up, scaling, part, own in parts:
            if up is None or scaling is None:
                grads.append(None)
                continue
            torch.mm(dy[self.here], up, out=own)
            # As (A x)^T dy and not dy^T (A x): the narrow factor is the one to be transposed.
            grads.append((part.T @ dy[self.here]).T * scaling)
        if dx is not None:
            dx[self.here].addmm_(g, self.down)
        downs = (g.T @ x[self.here]).split(self.ranks)
        return [
            (None, None) if kind is None or up is None else (down.to(kind), up.to(kind))
            for kind, down, up in zip(self.kinds, downs, grads, strict=True)
        ]

    def _split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(self.ranks, dim=1)


class _Group:
    """The products on one input, and their updates."""

    def __init__(self, shape: LayerShape, index: int, every: Factors) -> None:
        self.dtype = shape.dtype
        self.members = [shape.products[i] for i in _GROUPS[index]]
        self.updates = [_Updates(shape, index, span, every) for span in range(len(shape.spans))]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs, and A x of the updates of each span."""
        found: list[Tensor] = []
        for product in self.members:
            bias = None if product.bias is None else product.bias.to(self.dtype)
            found.append(F.linear(x, product.weight.to(self.dtype), bias))
        return found, [updates.forward(x, found) for updates in self.updates]

    def backward(
        self,
        x: Tensor,
        hidden: Sequence[Tensor | None],
        dys: list[Tensor],
        *,
        needs_dx: bool = True,
    ) -> tuple[Tensor | None, list[list[Pair[Tensor | None]]]]:
        """The gradient of x, and of A and B of each product and span."""
        dx: Tensor | None = None
        if needs_dx:
            dx = dys[0] @ self.members[0].weight.to(self.dtype)
            for dy, product in zip(dys[1:], self.members[1:], strict=True):
                dx.addmm_(dy, product.weight.to(self.dtype))
        found = [
            updates.backward(x, h, dys, dx) for updates, h in zip(self.updates, hidden, strict=True)
        ]
        return dx, [list(of_product) for of_product in zip(*found, strict=True)]


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
        hidden = (*h1, *h2, *h3, *h4)
        ctx.save_for_backward(
            flat, r1, cos, sin, q, k, v, o, mid, r2, gate, up, *hidden, *factors, *weights
        )
        ctx.packing, ctx.shape, ctx.num_factors = packing, shape, len(factors)
        return torch.ops.aten._unsafe_view(result, x.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: a checkpoint gives each of them out once
        shape: LayerShape = ctx.shape
        each = len(shape.spans)
        flat, r1, cos, sin, q, k, v, o, mid, r2, gate, up = kept[:12]
        h1, h2, h3, h4 = (kept[12 + i * each : 12 + (i + 1) * each] for i in range(4))
        rest = kept[12 + 4 * each :]
        factors, weights = rest[: ctx.num_factors], rest[ctx.num_factors :]
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


def _every_factor(shape: LayerShape, factors: Sequence[Tensor]) -> Factors:
    """A and B of all products and spans, None for those without an update."""
    left = iter(factors)
    return [
        [None if scaling is None else (next(left), next(left)) for scaling in product.scalings]
        for product in shape.products
    ]


def _of_updates(
    shape: LayerShape, found: Sequence[Sequence[Pair[Tensor | None]]]
) -> list[Tensor | None]:
    """The gradients of the factors, in their order."""
    return [
        gradient
        for product, pairs in zip(shape.products, found, strict=True)
        for scaling, pair in zip(product.scalings, pairs, strict=True)
        if scaling is not None
        for gradient in pair
    ]


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
