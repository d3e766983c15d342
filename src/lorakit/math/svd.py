"""Spectra of low-rank products, never forming the product."""

from __future__ import annotations

import torch
from torch import Tensor


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The r largest singular values of B A, from two thin QR factorisations.

    With B = Q_b T_b and A^T = Q_a T_a, B A = Q_b (T_b T_a^T) Q_a^T has the singular values of the
    small r x r matrix in the middle.

    Args:
        B: (out, r), any floating dtype.
        A: (r, in), any floating dtype.

    Returns:
        (min(r, out, in),) float64, descending.
    """
    triangle_b = torch.linalg.qr(B.double(), mode="r").R
    triangle_a = torch.linalg.qr(A.double().T, mode="r").R
    return torch.linalg.svdvals(triangle_b @ triangle_a.T)


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the spectrum's entropy (Roy and Vetterli 2007); 0 for a zero matrix.

    Args:
        singular_values: (n,) non-negative.
    """
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    p = singular_values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))
