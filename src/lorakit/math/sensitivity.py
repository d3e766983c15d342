"""AdaLoRA's arithmetic: what a direction is worth, how the budget falls, how far from orthogonal.

After Zhang et al. 2023 (arXiv 2303.10512). A direction is a triplet: a value lambda_i, a row of Q,
a column of P.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Smoothed:
    """The sensitivity |w dL/dw| of every number of a tensor, and how uncertain it is, smoothed.

    I~ = b1 I~ + (1 - b1) I and U~ = b2 U~ + (1 - b2) |I - I~| (eq. 9 and 10).

    Args:
        like: the tensor that is watched; two of its size are kept.

    Attributes:
        sensitivity: I~.
        uncertainty: U~.
    """

    def __init__(self, like: Tensor) -> None:
        self.sensitivity = torch.zeros_like(like, requires_grad=False)
        self.uncertainty = torch.zeros_like(like, requires_grad=False)

    def see(self, weight: Tensor, gradient: Tensor, betas: tuple[float, float]) -> None:
        """Take in one step's weight and gradient; mutates the two averages."""
        now = (weight.detach() * gradient.detach()).abs_()
        self.sensitivity.mul_(betas[0]).add_(now, alpha=1 - betas[0])
        self.uncertainty.mul_(betas[1]).add_(now.sub_(self.sensitivity).abs_(), alpha=1 - betas[1])

    def scores(self) -> Tensor:
        """I~ U~ of every number (eq. 11)."""
        return self.sensitivity * self.uncertainty


def triplet_scores(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij) (eq. 7), (r,).

    Args:
        left: scores of P, (out, r).
        values: scores of lambda, (r,).
        right: scores of Q, (r, in).
    """
    return values + left.mean(0) + right.mean(1)


def budget_at(step: int, *, first: int, last: int, warmup: int, settled: int) -> int:
    """The budget after a step: `first` for a while, then falling as a cubic, then `last` (eq. 12).

    Args:
        step: optimizer steps done.
        first: the budget at the start.
        last: the budget at the end.
        warmup: the step up to which it does not fall.
        settled: the step from which it has fallen.
    """
    if step >= settled:
        return last
    if step <= warmup:
        return first
    left = 1 - (step - warmup) / (settled - warmup)
    return int(last + (first - last) * left**3)


def keep_directions(
    scores: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, Tensor]:
    """The directions that a budget pays for, the highest score first; every site keeps one.

    A direction that is too dear for what is left is passed over, and cheaper ones behind it are
    still looked at.

    Args:
        scores: site -> score of each of its directions, (r,).
        costs: site -> what one direction takes.
        budget: what all of them may take.

    Returns:
        Site -> which directions are kept, bool (r,).
    """
    kept = {name: torch.zeros(len(own), dtype=torch.bool) for name, own in scores.items()}
    best = {name: int(own.argmax()) for name, own in scores.items()}
    for name, index in best.items():
        kept[name][index] = True
    left = budget - sum(costs[name] for name in scores)
    # Of equal scores the earlier site and direction comes first: sorted is stable.
    every = ((float(s), name, i) for name, own in scores.items() for i, s in enumerate(own))
    for _, name, index in sorted(every, key=lambda triplet: -triplet[0]):
        if index != best[name] and costs[name] <= left:
            kept[name][index] = True
            left -= costs[name]
    return kept


def far_from_orthonormal(left: Tensor, right: Tensor) -> Tensor:
    """||P^T P - I||_F^2 + ||Q Q^T - I||_F^2 (eq. 4), a scalar with gradients.

    Args:
        left: P, (out, r).
        right: Q, (r, in).
    """
    identity = torch.eye(right.shape[0], dtype=right.dtype, device=right.device)
    inner = (left.T @ left - identity).square().sum()
    return inner + (right @ right.T - identity).square().sum()
