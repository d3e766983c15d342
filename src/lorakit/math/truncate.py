"""The best matrix of a given rank, and exactly what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.math.svd import numerical_rank, product_svd

# Above this many rows and columns an exact SVD takes tens of seconds, and a low rank does not
# need it.
_EXACT_SIZE = 2048
_OVERSAMPLING = 16
_NUM_ITERATIONS = 4
# Factors are stored in float32: a direction below this share of the first is rounding.
_NOISE = 1e-7
# Below this share of ||B|| ||A||, a singular value is what float64 leaves of a cancelled sum.
_CANCELLED = 1e-13


@dataclass(frozen=True, slots=True)
class Truncated:
    """B A, the best approximation of a matrix M at its rank (Eckart and Young 1936).

    Attributes:
        A: (r, in) float32, the singular values shared with B by their roots.
        B: (out, r) float32.
        error: ||M - B A||_F, the root of the sum of the discarded squared singular values.
        norm: ||M||_F.
    """

    A: Tensor
    B: Tensor
    error: float
    norm: float


def truncate_product(B: Tensor, A: Tensor, r: int | None = None) -> Truncated:
    """The best rank-r approximation of B A, the product never formed.

    Args:
        B: (out, n), any floating dtype.
        A: (n, in), any floating dtype.
        r: the rank; None for as many directions as are not rounding noise. Directions that are
            exactly nothing are left out at any rank, but one is always kept.
    """
    left, values, right = product_svd(B, A)
    floor = _CANCELLED * float(B.double().norm() * A.double().norm())
    return _cut(left, torch.where(values > floor, values, 0.0), right, r)


def truncate_dense(matrix: Tensor, r: int) -> Truncated:
    """The best rank-r approximation of a matrix.

    Up to 2048 on its shorter side the SVD is exact. Beyond, the leading directions are found by
    randomized SVD with oversampling and four power iterations (Halko et al. 2011), seeded, and the
    error is that of what was found.

    Args:
        matrix: M, (out, in).
        r: the rank.
    """
    shorter = min(matrix.shape)
    if shorter <= _EXACT_SIZE or 4 * r >= shorter:
        left, values, rows = torch.linalg.svd(matrix.float(), full_matrices=False)
        return _cut(left.double(), values.double(), rows.T.double(), r)
    wide = matrix.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = min(r + _OVERSAMPLING, shorter)
        left, values, right = torch.svd_lowrank(wide, q=size, niter=_NUM_ITERATIONS)
    found = _cut(left, values, right, r)
    error = float(torch.linalg.matrix_norm(wide - found.B @ found.A))
    return Truncated(found.A, found.B, error, float(torch.linalg.matrix_norm(wide)))


def _cut(left: Tensor, values: Tensor, right: Tensor, r: int | None) -> Truncated:
    real = numerical_rank(values, relative=_NOISE)
    kept = max(1, real if r is None else min(r, real))
    root = values[:kept].sqrt()
    return Truncated(
        A=(root[:, None] * right[:, :kept].T).float().contiguous(),
        B=(left[:, :kept] * root).float().contiguous(),
        error=float(values[kept:].norm()),
        norm=float(values.norm()),
    )
