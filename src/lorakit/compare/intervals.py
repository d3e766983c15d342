"""How sure a score is over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

# The 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z = 1.959963984540054


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t; beyond 30 degrees its expansion around the normal's."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {degrees}")
    if degrees <= len(_T):
        return _T[degrees - 1]
    # Abramowitz and Stegun 26.7.5, two terms: right to four digits here.
    return _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95 % t-interval over seeds, median, and the values.

    The interval speaks of the seeds alone: the rows that are scored are the same in every run. One
    run has no interval.
    """
    n = len(values)
    centre = mean(values)
    interval = None
    if n > 1:
        half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
        interval = [centre - half, centre + half]
    return {
        "value": centre,
        "interval": interval,
        "median": median(values),
        "n": n,
        "values": list(values),
    }
