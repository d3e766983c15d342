"""Thin out and reconcile the changes of several adapters, number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(change: Tensor, density: float) -> Tensor:
    """The largest numbers of a change by magnitude, zero elsewhere.

    Args:
        change: any shape.
        density: the share that is kept, 0 < density <= 1; rounded up to whole numbers.

    Returns:
        A new tensor, or `change` itself at density 1.
    """
    count = math.ceil(density * change.numel())
    if count >= change.numel():
        return change
    flat = change.flatten()
    kept = torch.topk(flat.abs(), count, sorted=False).indices
    thinned = torch.zeros_like(flat)
    thinned[kept] = flat[kept]
    return thinned.view_as(change)


def drop_and_rescale(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE: each number stays with probability `density`, divided by it (Yu et al. 2023, eq. 3).

    The expected value is the change itself. arXiv 2311.03099 calls 1 - density the drop rate p.

    Args:
        change: any shape.
        density: 0 < density <= 1.
        generator: where the choice comes from, on the change's device.

    Returns:
        A new tensor, or `change` itself at density 1.
    """
    if density >= 1:
        return change
    chosen = torch.rand(change.shape, generator=generator, device=change.device) < density
    return change * chosen / density


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of w_i change_i."""
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total = total + change * weight
    return total


def agreeing_sum(changes: Sequence[Tensor], weights: Sequence[float], total: float) -> Tensor:
    """TIES: elect a sign per number, average over those that have it (Yadav et al. 2023).

    The sign is that of the weighted sum. Where the changes S agree with it, the result is
    `total` (the sum over S of w_i change_i) / (the sum over S of |w_i|): the paper's disjoint mean
    (arXiv 2306.01708, section 3) with weights, at lambda = `total`. Where nothing is zero and
    nothing disagrees, it is the weighted sum.

    Args:
        changes: already thinned out; same shapes.
        weights: one per change, not zero.
        total: the sum of |w| over all parts, also those that do not change this tensor.
    """
    elected = torch.sign(weighted_sum(changes, weights))
    above = torch.zeros_like(elected)
    below = torch.zeros_like(elected)
    for change, weight in zip(changes, weights, strict=True):
        weighted = change * weight
        agrees = (torch.sign(weighted) == elected) & (weighted != 0)
        above += torch.where(agrees, weighted, 0.0)
        below += agrees * abs(weight)
    return torch.where(below > 0, total * above / below.clamp_min(1e-30), 0.0)


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """What spherical interpolation multiplies two changes by (Shoemake 1985).

    sin((1 - t) w) / sin w and sin(t w) / sin w with cos w = `cosine`; where the two changes are
    parallel or opposed, the sphere gives no path and the straight line is taken.

    Args:
        cosine: of the angle between the two changes.
        t: 0 for the first, 1 for the second.
    """
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return 1.0 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
