"""DoRA: a weight as magnitude times direction (Liu et al. 2024, arXiv 2402.09353).

W' = m (W0 + s B A) / ||W0 + s B A||_c, with one norm per output row. The norm is a constant in the
backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of W0 + s B A that exist at a time: a block stays in the processor's cache, and on a GPU
# there are few launches.
_CPU_BLOCK = 2**18
_GPU_BLOCK = 2**26


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """||W0 + s B A|| of each row, without the whole W0 + s B A in memory.

    Blocks of the sum are built and reduced one after the other. The expansion ||W0||^2 + 2 s <W0,
    B A> + s^2 ||B A||^2 needs no block at all, but it is slower (the skinny product W0 A^T reads
    W0 once more) and loses digits by cancellation where s B A undoes most of a row.

    Args:
        weight: W0, (out, in), any floating dtype and any strides.
        A: (r, in).
        B: (out, r).
        scaling: s.

    Returns:
        (out,) float32, or wider where an argument is; detached.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    limit = _CPU_BLOCK if weight.device.type == "cpu" else _GPU_BLOCK
    W, A_, B_ = weight.detach(), A.detach().to(wide), B.detach().to(wide)
    if W.stride(0) < W.stride(1):
        # Stored as (in, out): blocks of memory are columns here, and their squares are added up.
        return _over_columns(W.T, A_.T, B_.T, scaling, limit).sqrt()
    step = max(1, limit // max(1, W.shape[1]))
    norms = [
        torch.linalg.vector_norm(torch.addmm(rows.to(wide), part, A_, alpha=scaling), dim=1)
        for rows, part in zip(W.split(step), B_.split(step), strict=True)
    ]
    return torch.cat(norms)


def _over_columns(weight: Tensor, A: Tensor, B: Tensor, scaling: float, limit: int) -> Tensor:
    """The squared norms for W0 stored as (in, out), A as (in, r), B as (r, out)."""
    step = max(1, limit // max(1, weight.shape[1]))
    total = torch.zeros(weight.shape[1], dtype=A.dtype, device=weight.device)
    for columns, part in zip(weight.split(step), A.split(step), strict=True):
        block = torch.addmm(columns.to(A.dtype), part, B, alpha=scaling)
        total += block.square_().sum(0)
    return total


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """What DoRA multiplies each row of W0 + s B A by: m / ||W0 + s B A||.

    Args:
        magnitude: m, (out,); the gradient flows to it.
        norms: (out,), see `row_norms`.
    """
    return magnitude / norms


def dora_change(
    weight: Tensor, A: Tensor, B: Tensor, *, scaling: float, magnitude: Tensor
) -> Tensor:
    """W' - W0 = (g - 1) W0 + g s B A with g = m / ||W0 + s B A||, in float32 or wider.

    Args:
        weight: W0, (out, in).
        A: (r, in).
        B: (out, r).
        scaling: s.
        magnitude: m, (out,).

    Returns:
        (out, in).
    """
    norms = row_norms(weight, A, B, scaling)
    g = gain(magnitude.detach().to(norms.dtype), norms)[:, None]
    product = B.detach().to(norms.dtype) @ A.detach().to(norms.dtype)
    return (g - 1) * weight.detach().to(norms.dtype) + g * scaling * product
