"""Successive halving: after which steps arms are judged, and which of them go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lorakit.sweep.config import Halving
from lorakit.train.merit import Merit


def rungs(halving: Halving, num_arms: int, max_steps: int) -> tuple[int, ...]:
    """The steps after which arms are dropped: while there is more than one, and before the end."""
    steps: list[int] = []
    left = num_arms
    while halving.every is not None and left > 1:
        step = halving.every * (len(steps) + 1)
        if step >= max_steps:
            break
        steps.append(step)
        left = num_kept(halving, left)
    return tuple(steps)


def num_kept(halving: Halving, num_arms: int) -> int:
    """How many arms of so many go on: the share, rounded up, but one less at least."""
    return max(1, min(num_arms - 1, math.ceil(halving.keep * num_arms)))


def survivors(
    names: Sequence[str], merits: Mapping[str, Merit | None], halving: Halving
) -> list[str]:
    """The names that go on, in their old order.

    Args:
        names: the arms that were trained up to this rung.
        merits: how good they are there; None for an arm that failed: it never goes on.
        halving: how many go on.
    """
    scored = [(found, name) for name in names if (found := merits[name]) is not None]
    if len(scored) < 2:
        return [name for _, name in scored]
    # An arm that failed has made room already.
    kept = min(num_kept(halving, len(names)), len(scored))
    chosen = {name for _, name in sorted(scored, key=lambda arm: arm[0], reverse=True)[:kept]}
    return [name for name in names if name in chosen]
