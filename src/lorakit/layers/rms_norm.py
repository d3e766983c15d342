"""Root-mean-square normalisation in few passes over memory, for frozen weights on a CPU.

    y = w x r,   r = 1 / sqrt(mean(x^2) + eps)
    dx = r g - x r^3 mean(g x),   g = w dy

transformers' own modules take the input to float32, square it, average it, scale it and take it
back, each a pass over memory forward and again backward. Here each row's norm is one reduction in
float32, the input is the only thing kept, and products read and write the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PROBE_ROWS = 4
_TOLERANCE = 1e-5


class _Norm(Protocol):
    weight: Tensor


def use_fast_norms(model: nn.Module) -> int:
    """Let the model's frozen RMS norms run through `rms_norm`; returns how many do.

    Mutates `model`: the modules that are recognised, and found equal on a probe in float32, get
    their forward replaced; `use_own_norms` takes it away. Off the CPU, and with a weight that is
    trained, they run their own forward.
    """
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module):
            offset = _offset_of(module)
            if offset is not None:
                fast = partial(_forward, module, module.forward, offset)
                module.forward = cast(Callable[..., Any], fast)
                count += 1
    return count


def use_own_norms(model: nn.Module) -> None:
    """Undo `use_fast_norms`."""
    for module in model.modules():
        mine = vars(module).get("forward")
        if isinstance(mine, partial) and mine.func is _forward:
            del module.forward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """W x / sqrt(mean(x^2) + eps) over the last axis, with a gradient for x alone.

    Args:
        x: (..., n), any floating dtype.
        weight: (n,), frozen, in x's dtype.
        eps: added to the mean of squares.

    Returns:
        Like x; the norm is computed in float32, or wider.
    """
    return _RmsNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, (..., 1), float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (norm.square_() / x.shape[-1] + eps).rsqrt_()


def norm_forward(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """W x r for r = `inverse_rms`, like x."""
    # With `out` the product is computed in float32 and written in x's dtype, in one pass.
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x in `norm_forward`, which r depends on too."""
    g = dy * weight
    mean = (g * x).sum(-1, keepdim=True, dtype=scale.dtype) / x.shape[-1]
    along = torch.mul(x, scale.pow(3).mul_(mean).neg_(), out=torch.empty_like(x))
    return torch.mul(g, scale, out=g).add_(along)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return norm_forward(x, scale, weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        return norm_backward(grads[0], x, scale, weight), None, None


def _forward(
    module: nn.Module, own: Callable[[Tensor], Tensor], offset: float, x: Tensor
) -> Tensor:
    weight = cast(_Norm, module).weight
    known = x.device.type == "cpu" and x.dtype == weight.dtype and x.is_floating_point()
    if not known or weight.requires_grad:
        return own(x)
    return rms_norm(x, weight + offset if offset else weight, _eps_of(module))


def _offset_of(module: nn.Module) -> float | None:
    """What is added to the weight (Gemma: 1), or None when this is not the norm we know."""
    weight = dict(module.named_parameters()).get("weight")
    if weight is None or weight.ndim != 1 or weight.device.type != "cpu" or weight.requires_grad:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_ROWS, weight.shape[0], generator=generator)
    with torch.no_grad(), suppress(KeyError):
        mean = probe.square().mean(-1, keepdim=True)
        unit = probe * torch.rsqrt(mean + _eps_of(module))
        # In float32: a copy of the weight would hide what a module does besides.
        own = module(probe.to(weight.dtype)).float()
        exact = _TOLERANCE if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps * 2
        # In half precision 1 + w would be rounded, which Gemma's own norm does not do.
        for offset in (0.0, 1.0) if weight.dtype == torch.float32 else (0.0,):
            expected = unit * (weight.float() + offset)
            if torch.allclose(own, expected, rtol=exact, atol=exact):
                return offset
    return None


def _eps_of(module: nn.Module) -> float:
    own = vars(module)
    return float(own["variance_epsilon"] if "variance_epsilon" in own else own["eps"])
