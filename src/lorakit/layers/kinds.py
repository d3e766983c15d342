"""The geometry of a layer: what A and B look like, how they act on x, how they add to W.

Every kind agrees on one convention: lora_A maps the input to r numbers, lora_B maps those to the
output, and `delta(A, B)` is B A in the layout of the base weight. The scaling is applied outside.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.weights.nf4 import is_four_bit

Shape = tuple[int, ...]


class LayerKind(Protocol):
    """One geometry."""

    name: str
    weight_axis: int  # the axis of the base weight that runs over the outputs

    def refusal(self, base: nn.Module) -> str | None:
        """Why this very module cannot be adapted, or None."""
        ...

    def shape(self, base: nn.Module) -> Shape:
        """(out, in), with the kernel's sizes behind for a convolution."""
        ...

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """The shapes of A and B at rank r for a layer of this `shape`."""
        ...

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """Fill the factors in place so that B A is zero and learning can start."""
        ...

    def branch(self, base: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B A x, in the layout of the base's output; A and B in the dtype of the activations."""
        ...

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the layout of the base weight, in the dtype of the factors."""
        ...

    def bias(self, base: nn.Module) -> Tensor | None:
        """The base's own bias, (out,), or None."""
        ...

    def per_output(self, values: Tensor) -> Tensor:
        """One number per output, (out,), shaped to broadcast over the base's output."""
        ...


def _init_projection(weight: Tensor, fan_in: int, how: str) -> None:
    """Gaussian N(0, 1/fan_in) or Kaiming U(-1/sqrt(fan_in), 1/sqrt(fan_in)), in place."""
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        if how == "gaussian":
            weight.normal_(0.0, bound)
        else:
            weight.uniform_(-bound, bound)


# Classes of transformers that compute x W^T + b in a forward of their own; others are routers.
_PLAIN_LINEAR = frozenset({"FalconLinear"})


class LinearKind:
    """nn.Linear: W (out, in), A (r, in), B (out, r)."""

    name = "linear"
    weight_axis = 0

    def refusal(self, base: nn.Module) -> str | None:
        """Why this very module cannot be adapted, or None."""
        if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight and never calls it: no branch would run"
        own = type(base)
        if own.forward is nn.Linear.forward or own.__name__ in _PLAIN_LINEAR:
            return None
        if own.__module__.startswith("transformers.models."):
            return f"{own.__name__}.forward is more than a linear map"
        return None

    def shape(self, base: nn.Module) -> Shape:
        """(out, in)."""
        return _weight_shape(base)

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """A (r, in), B (out, r)."""
        out_features, in_features = shape
        return (r, in_features), (out_features, r)

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """A random, B zero."""
        _init_projection(A, A.shape[1], how)
        nn.init.zeros_(B)

    def branch(self, base: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(F.linear(x, A), B)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """(out, in)."""
        return B @ A

    def bias(self, base: nn.Module) -> Tensor | None:
        """(out,), or None."""
        return base.bias if isinstance(base, (nn.Linear, Conv1D)) else None

    def per_output(self, values: Tensor) -> Tensor:
        """(out,): the output's last axis."""
        return values


class Conv1DKind(LinearKind):
    """GPT-2's Conv1D: a linear layer whose weight is stored transposed, (in, out)."""

    name = "conv1d"
    weight_axis = 1

    def refusal(self, base: nn.Module) -> str | None:
        """None: every Conv1D can be adapted."""
        return None

    def shape(self, base: nn.Module) -> Shape:
        """(out, in), like a linear layer's."""
        in_features, out_features = _weight_shape(base)
        return out_features, in_features

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """(in, out)."""
        return (B @ A).T


class EmbeddingKind:
    """nn.Embedding: W (vocabulary, width), A (r, vocabulary), B (width, r); in = vocabulary."""

    name = "embedding"
    weight_axis = 1

    def refusal(self, base: nn.Module) -> str | None:
        """Why this very module cannot be adapted, or None."""
        if isinstance(base, nn.Embedding) and base.max_norm is not None:
            return "max_norm rewrites the weight during the forward pass"
        if type(base).forward is not nn.Embedding.forward and embedding_scale(base) is None:
            return f"{type(base).__name__}.forward is not a plain look-up"
        return None

    def shape(self, base: nn.Module) -> Shape:
        """(width, vocabulary)."""
        vocabulary, width = _weight_shape(base)
        return width, vocabulary

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """A (r, vocabulary), B (width, r)."""
        width, vocabulary = shape
        return (r, vocabulary), (width, r)

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """A zero, B random: a look-up reads one column of A, learned only when the token occurs."""
        nn.init.zeros_(A)
        _init_projection(B, B.shape[1], how)

    def branch(self, base: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Token ids (...) -> (..., width)."""
        y = F.linear(F.embedding(x, A.T), B)
        scale = embedding_scale(base)
        return y if scale is None else y * scale

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """(vocabulary, width)."""
        return (B @ A).T

    def bias(self, base: nn.Module) -> Tensor | None:
        """None: a look-up has none."""
        return None

    def per_output(self, values: Tensor) -> Tensor:
        """(width,): the output's last axis."""
        return values


class Conv2dKind:
    """nn.Conv2d: W (out, in, h, w), A (r, in, h, w), B (out, r, 1, 1)."""

    name = "conv2d"
    weight_axis = 0

    def refusal(self, base: nn.Module) -> str | None:
        """Why this very module cannot be adapted, or None."""
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            return f"a grouped convolution (groups={base.groups}) has no single B A"
        if isinstance(base, nn.Conv2d) and base.padding_mode != "zeros":
            return f"padding_mode={base.padding_mode!r} is not supported, only 'zeros'"
        return None

    def shape(self, base: nn.Module) -> Shape:
        """(out, in, h, w)."""
        return _weight_shape(base)

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """A (r, in, h, w), B (out, r, 1, 1)."""
        out_channels, *rest = shape
        return (r, *rest), (out_channels, r, 1, 1)

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """A random, B zero."""
        _init_projection(A, A[0].numel(), how)
        nn.init.zeros_(B)

    def branch(self, base: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(n, in, H, W) -> (n, out, H', W')."""
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"expected nn.Conv2d, found {type(base)}")
        hidden = F.conv2d(x, A, None, base.stride, base.padding, base.dilation)
        return F.conv2d(hidden, B)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """(out, in, h, w)."""
        return torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)

    def bias(self, base: nn.Module) -> Tensor | None:
        """(out,), or None."""
        return base.bias if isinstance(base, nn.Conv2d) else None

    def per_output(self, values: Tensor) -> Tensor:
        """(out, 1, 1): the output's channel axis."""
        return values[:, None, None]


LINEAR = LinearKind()
CONV1D = Conv1DKind()
EMBEDDING = EmbeddingKind()
CONV2D = Conv2dKind()
KINDS: dict[str, LayerKind] = {k.name: k for k in (LINEAR, CONV1D, EMBEDDING, CONV2D)}


def as_matrix(kind: LayerKind, weight: Tensor) -> Tensor:
    """A base weight as (out, everything else), a view where the layout allows one."""
    return weight.movedim(kind.weight_axis, 0).flatten(1)


def from_matrix(kind: LayerKind, matrix: Tensor, shape: Shape) -> Tensor:
    """The inverse of `as_matrix` for a base weight of this `shape`."""
    moved = (shape[kind.weight_axis], *(n for i, n in enumerate(shape) if i != kind.weight_axis))
    return matrix.reshape(moved).movedim(0, kind.weight_axis)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The geometry of a module, or None when there is none for its class."""
    if isinstance(module, Conv1D):
        return CONV1D
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Conv2d):
        return CONV2D
    return None


def _weight_shape(base: nn.Module) -> Shape:
    if isinstance(base, nn.Linear) and is_four_bit(base):
        # Its parameter is a column of packed bytes.
        return base.out_features, base.in_features
    return tuple(base.get_parameter("weight").shape)


def embedding_scale(base: nn.Module) -> Tensor | float | None:
    """The factor that scaled word embeddings (Gemma, BART) put on every look-up."""
    return getattr(base, "embed_scale", None)
