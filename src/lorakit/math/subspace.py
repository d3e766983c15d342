"""How much two subspaces share, and how much of a weight lies in one."""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Phi of every pair of leading subspaces (Hu et al. 2021, eq. 4 and appendix G).

    phi(i, j) = ||V1[:, :i]^T V2[:, :j]||_F^2 / min(i, j) for i = 1 ... r1 and j = 1 ... r2: 1 where
    one subspace contains the other, 0 where they are orthogonal. With the projection metric
    d^2 = p - ||.||_F^2, p = min(i, j), it is 1 - d^2 / p (the paper prints (1 - d^2) / p).

    Args:
        first: V1, (d, r1), orthonormal columns, the leading direction first.
        second: V2, (d, r2), likewise.

    Returns:
        (r1, r2) float64, from 0 to 1; entry [i - 1, j - 1] is phi(i, j).
    """
    squares = (first.double().T @ second.double()).square()
    shared = squares.cumsum(0).cumsum(1)
    i = torch.arange(1, shared.shape[0] + 1, device=shared.device)[:, None]
    j = torch.arange(1, shared.shape[1] + 1, device=shared.device)[None, :]
    return (shared / torch.minimum(i, j)).clamp(0.0, 1.0)


def chance_similarity(d: int, i: int, j: int) -> float:
    """The expected phi of two random subspaces of R^d: (i j / d) / min(i, j) = max(i, j) / d."""
    return max(i, j) / d


def random_directions(d: int, r: int, *, generator: torch.Generator) -> Tensor:
    """Leading singular directions of a Gaussian matrix: r random orthonormal columns, (d, r).

    Args:
        d: the dimension of the space.
        r: how many, at most d.
        generator: where the numbers come from, on the CPU.
    """
    gaussian = torch.randn(d, r, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian).Q


def projected_norm(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """||U^T W V||_F: how much of W maps the directions V to the directions U (the paper's Table 7).

    Args:
        weight: W, (out, in).
        left: U, (out, r), orthonormal columns.
        right: V, (in, r), orthonormal columns.
    """
    inside = left.to(weight.dtype).T @ weight @ right.to(weight.dtype)
    return float(torch.linalg.matrix_norm(inside.double()))


def inner_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """<B A, B' A'> = sum of (B^T B') * (A A'^T), without forming either product.

    Args:
        first: B (out, r), A (r, in).
        second: B' (out, r'), A' (r', in).
    """
    outputs = first[0].double().T @ second[0].double()
    inputs = first[1].double() @ second[1].double().T
    return float((outputs * inputs).sum())


def intruders(
    base: Tensor, tuned: Tensor, *, largest: int = 10, threshold: float = 0.5
) -> list[int]:
    """Which leading directions of a tuned weight are like none of the base's.

    A left singular vector of W0 + dW among the `largest` first is an intruder where its largest
    absolute cosine with a left singular vector of W0 is below the threshold (Shuttleworth et al.
    2024, arXiv 2410.21228, algorithm 1).

    Args:
        base: left singular vectors of W0, (out, n).
        tuned: left singular vectors of W0 + dW, (out, m), the leading first.
        largest: how many of the tuned weight's are looked at.
        threshold: epsilon of the paper.

    Returns:
        The positions of the intruders, 0 for the leading direction.
    """
    cosines = (base.double().T @ tuned[:, :largest].double()).abs().amax(0)
    return [k for k, cosine in enumerate(cosines.tolist()) if cosine < threshold]
