"""Ranks that fit a budget: equal ones, or more where the data says that more is learned.

The budget counts the numbers of the low-rank updates (A, B and DoRA's m), not biases or modules
trained beside. Every site keeps at least rank 1 and gets at most `MOST` times the equal rank.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lorakit.adapters.adapter import Factors
from lorakit.adapters.budget import cost_of, equal_rank, full_rank
from lorakit.adapters.plan import Site
from lorakit.adapters.spec import LoraSpec
from lorakit.math.scaling import alpha_for

MOST = 4


def most_of(site: Site, equal: int) -> int:
    """The largest rank that a site may get: `MOST` times the equal one, and no more than it has."""
    return min(MOST * equal, full_rank(site))


def allocate(sites: Sequence[Site], gains: Mapping[str, Tensor], num_params: int) -> dict[str, int]:
    """Ranks within the budget that gain most: directions are bought best gain per parameter first.

    Args:
        sites: what is adapted.
        gains: site name -> what its first, second, ... direction gains, (n,) not increasing.
        num_params: the budget.

    Returns:
        Site name -> rank, at least 1, at most `most_of`.

    Raises:
        SpecError: rank 1 everywhere is already more than the budget.
    """
    equal = equal_rank(sites, num_params)
    by_name = {site.name: site for site in sites}
    ranks = dict.fromkeys(by_name, 1)
    left = num_params - sum(site.num_params_at(1) for site in sites)
    # Of equal gains the smaller rank grows first, then the order of the sites decides.
    queue = [(-_gain(gains, site, 1), 1, place, site.name) for place, site in enumerate(sites)]
    heapq.heapify(queue)
    while queue:
        _, _, place, name = heapq.heappop(queue)
        site = by_name[name]
        if cost_of(site) > left or ranks[name] >= most_of(site, equal):
            continue
        ranks[name] += 1
        left -= cost_of(site)
        heapq.heappush(queue, (-_gain(gains, site, ranks[name]), ranks[name], place, name))
    return ranks


def _gain(gains: Mapping[str, Tensor], site: Site, k: int) -> float:
    """What the direction behind the first k gains per parameter."""
    values = gains[site.name]
    return float(values[k]) / cost_of(site) if k < len(values) else 0.0


def with_ranks(spec: LoraSpec, ranks: Mapping[str, int], equal: int) -> LoraSpec:
    """The request with its ranks chosen; every site keeps the scaling of the equal rank.

    Args:
        spec: with r: auto.
        ranks: site name -> rank.
        equal: the rank that all sites would have within the same budget.
    """
    scaling = spec.scale(r=equal, alpha=spec.alpha)
    # Of two names that end alike the longer one must be asked first.
    others = sorted((n for n, r in ranks.items() if r != equal), key=lambda n: (-len(n), n))
    return replace(
        spec,
        r=equal,
        budget=None,
        ranks="uniform",
        rank_pattern={name: ranks[name] for name in others},
        alpha_pattern={name: alpha_for(scaling, ranks[name], spec.scaling) for name in others},
    )


def spec_of_factors(spec: LoraSpec, factors: Mapping[str, Factors]) -> LoraSpec:
    """The request that is answered by these very factors, whatever was asked for at first.

    Args:
        spec: what else is asked for: dropout, scaling rule, biases.
        factors: site name -> update.
    """
    r = Counter(f.r for f in factors.values()).most_common(1)[0][0] if factors else 1
    alphas = Counter(f.alpha for f in factors.values())
    alpha = alphas.most_common(1)[0][0] if alphas else spec.alpha
    # Of two names that end alike the longer one must be asked first.
    names = sorted(factors, key=lambda name: (-len(name), name))
    return replace(
        spec,
        r=r,
        alpha=alpha,
        budget=None,
        ranks="uniform",
        init="gaussian",
        rank_pattern={name: factors[name].r for name in names if factors[name].r != r},
        alpha_pattern={n: factors[n].alpha for n in names if factors[n].alpha != alpha},
    )
