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


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V of B A = U diag(S) V^T from two thin QR factorisations, the product never formed.

    With B = Q_b T_b and A^T = Q_a T_a, the SVD of the small T_b T_a^T turns Q_b and Q_a into U and
    V. It does not depend on how the product is split: B M and M^-1 A give the same.

    Args:
        B: (out, r), any floating dtype.
        A: (r, in), any floating dtype.

    Returns:
        (out, n), (n,) descending, (in, n) float64, n = min(r, out, in).
    """
    basis_b, triangle_b = torch.linalg.qr(B.double())
    basis_a, triangle_a = torch.linalg.qr(A.double().T)
    left, values, right = torch.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    return basis_b @ left, values, basis_a @ right.T


def numerical_rank(singular_values: Tensor, *, relative: float = 1e-6) -> int:
    """How many singular values are above rounding noise: larger than `relative` times the first.

    Args:
        singular_values: (n,) non-negative, descending.
        relative: what counts as zero beside the largest value; factors are stored in float32.
    """
    if not len(singular_values) or singular_values[0] <= 0:
        return 0
    return int((singular_values > relative * singular_values[0]).sum())


def stable_rank(singular_values: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2; 0 for a zero matrix.

    Args:
        singular_values: (n,) non-negative, descending.
    """
    if not len(singular_values) or singular_values[0] <= 0:
        return 0.0
    return float((singular_values.double() / singular_values[0]).square().sum())
