"""How two low-rank changes of one weight get into each other's way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.math.subspace import chance_similarity, inner_product, subspace_similarity
from lorakit.math.svd import numerical_rank, product_svd

# Numbers of B A that exist at a time.
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Interference:
    """Two changes D1 and D2 of one weight (out, in), weights included.

    Attributes:
        overlap_in: phi of the input directions they read, 0 to 1 (see
            `lorakit.math.subspace.subspace_similarity`).
        overlap_out: phi of the output directions they write.
        chance_in, chance_out: the expected phi of random subspaces of these sizes.
        cosine: <D1, D2> / (||D1|| ||D2||): above 0 they add up, below 0 they cancel.
        sign_conflict: over all numbers, each counted with the smaller of the two magnitudes, the
            share where the signs differ; 0.5 for unrelated changes.
        strength: ||D1|| ||D2||, by which sites are averaged.
    """

    overlap_in: float
    overlap_out: float
    chance_in: float
    chance_out: float
    cosine: float
    sign_conflict: float
    strength: float


def interference(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> Interference | None:
    """Measure two changes; None where one of them is zero.

    Args:
        first: B1 (out, r1), A1 (r1, in), scaling and weight multiplied in.
        second: B2 (out, r2), A2 (r2, in), likewise.
    """
    (left1, values1, right1), (left2, values2, right2) = product_svd(*first), product_svd(*second)
    r1, r2 = numerical_rank(values1), numerical_rank(values2)
    if not r1 or not r2:
        return None
    strength = float(values1.norm() * values2.norm())
    return Interference(
        overlap_in=float(subspace_similarity(right1[:, :r1], right2[:, :r2])[-1, -1]),
        overlap_out=float(subspace_similarity(left1[:, :r1], left2[:, :r2])[-1, -1]),
        chance_in=chance_similarity(right1.shape[0], r1, r2),
        chance_out=chance_similarity(left1.shape[0], r1, r2),
        cosine=inner_product(first, second) / strength,
        sign_conflict=sign_conflict(first, second),
        strength=strength,
    )


def sign_conflict(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The share of the smaller magnitudes that stand under different signs; 0 for zero changes.

    The products are formed in blocks of rows, never whole.
    """
    step = max(1, _BLOCK // first[1].shape[1])
    opposed = common = 0.0
    for rows1, rows2 in zip(first[0].split(step), second[0].split(step), strict=True):
        found = _opposed_and_common(rows1 @ first[1], rows2 @ second[1])
        opposed, common = opposed + found[0], common + found[1]
    return opposed / common if common else 0.0


def dense_sign_conflict(first: Tensor, second: Tensor) -> float:
    """The same of two changes that are at hand as matrices, (out, in)."""
    opposed, common = _opposed_and_common(first, second)
    return opposed / common if common else 0.0


def _opposed_and_common(one: Tensor, two: Tensor) -> tuple[float, float]:
    """Sums of the smaller magnitudes: where the signs differ, and of all numbers."""
    smaller = torch.minimum(one.abs(), two.abs()).double()
    return float(smaller[torch.sign(one) != torch.sign(two)].sum()), float(smaller.sum())
