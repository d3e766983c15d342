"""Smaller ranks after training: the singular directions that matter least are cut off."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.budget import budget_params
from lorakit.adapters.parameters import stacked_parameters
from lorakit.adapters.strict import not_finite
from lorakit.errors import AdapterFileError, SpecError
from lorakit.formatting import format_count
from lorakit.math.scaling import alpha_for
from lorakit.math.svd import product_singular_values, product_svd

# Of what is wrong with an adapter.
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned adapter, and what was cut.

    Attributes:
        adapter: the smaller adapter; every site keeps its scaling and at least rank 1.
        ranks: site -> rank before and after.
        errors: site -> ||s B A - s B' A'||_F / ||s B A||_F of the factors as they are stored: the
            discarded tail of the spectrum, and what rounding to their dtype adds.
        num_params: learned numbers before and after.
        error: the same ratio for the whole update.
    """

    adapter: Adapter
    ranks: Mapping[str, tuple[int, int]]
    errors: Mapping[str, float]
    num_params: tuple[int, int]
    error: float


def prune_adapter(
    adapter: Adapter, *, budget: int | str | None = None, energy: float | None = None
) -> Pruned:
    """Cut every site's update to its leading singular directions.

    With a budget, directions are kept by sigma^2 per parameter over all sites, so that the squared
    error of the whole update is as small as the budget allows; with an energy, as few as hold that
    share of the sum of all sigma^2, the largest first. sigma are the singular values of s B A (for
    DoRA of what is added before the norm is taken). The given adapter is not changed, and the
    factors keep their dtype.

    Args:
        adapter: what to prune; its factors are split anew, B' = U S^(1/2), A' = S^(1/2) V^T.
        budget: parameters or bytes for A, B and DoRA's m, as `budget_params` reads them; bytes of
            the dtype that they are stored in.
        energy: share of the sum of squares to keep, 0 to 1.

    Raises:
        SpecError: not exactly one of budget and energy, or one that cannot be.
        AdapterFileError: the adapter has numbers that are not finite, or no low-rank update.
    """
    if (budget is None) == (energy is None):
        raise SpecError(
            "what to keep is given twice or not at all",
            where="budget and energy",
            expected="one of them",
        )
    if energy is not None and not 0 < energy <= 1:
        raise SpecError(
            "the share to keep is out of range",
            where="energy",
            expected="0 < energy <= 1",
            found=f"{energy:g}",
        )
    _require_prunable(adapter)
    spectra = {name: _decomposed(factors) for name, factors in adapter.factors.items()}
    kept = (
        _by_budget(adapter, spectra, budget_params(budget, bytes_per_param=_itemsize(adapter)))
        if budget is not None
        else _by_energy(spectra, energy or 1.0)
    )
    factors = {name: _cut(f, spectra[name], kept[name]) for name, f in adapter.factors.items()}
    norms = {name: float(parts[1].norm()) for name, parts in spectra.items()}
    lost = {name: _distance(f, factors[name]) for name, f in adapter.factors.items()}
    whole = math.hypot(*norms.values())
    ranks = {name: (f.r, kept[name]) for name, f in adapter.factors.items()}
    before = adapter.num_params()
    smaller = _with(adapter, factors, before)
    return Pruned(
        adapter=smaller,
        ranks=ranks,
        errors={name: lost[name] / norm if norm else 0.0 for name, norm in norms.items()},
        num_params=(before, smaller.num_params()),
        error=math.hypot(*lost.values()) / whole if whole else 0.0,
    )


def _require_prunable(adapter: Adapter) -> None:
    if not adapter.factors:
        raise AdapterFileError("the adapter has no low-rank update that could be pruned")
    stacked = next(iter(stacked_parameters(adapter)), None)
    if stacked is not None:
        raise AdapterFileError(
            "the experts of one parameter have one rank in PEFT's file: sites cannot be cut one by "
            "one",
            where=stacked,
            remedy="the best approximation at one rank: lorakit compose DIR --how svd -r R",
        )
    problems = not_finite(adapter)
    if problems:
        raise AdapterFileError(
            "the adapter has numbers that are not finite", found="\n".join(problems[:_SHOWN])
        )


def _itemsize(adapter: Adapter) -> int:
    """Bytes of one stored number; the widest where they differ."""
    return max(max(f.A.itemsize, f.B.itemsize) for f in adapter.factors.values())


def _distance(one: Factors, other: Factors) -> float:
    """||s B A - s B' A'||_F of one site before and after, as both are stored."""
    if other is one:
        return 0.0
    B = torch.cat([one.B.flatten(1).double(), -other.B.flatten(1).double()], 1)
    A = torch.cat([one.A.flatten(1).double(), other.A.flatten(1).double()])
    return abs(one.scaling) * float(product_singular_values(B, A).norm())


_Spectrum = tuple[Tensor, Tensor, Tensor]


def _decomposed(factors: Factors) -> _Spectrum:
    left, values, right = product_svd(factors.B.flatten(1), factors.A.flatten(1))
    return left, values * abs(factors.scaling), right


def _cost(factors: Factors) -> int:
    """What one more rank costs, in parameters."""
    return factors.A[0].numel() + factors.B[:, 0].numel()


def _by_budget(
    adapter: Adapter, spectra: Mapping[str, _Spectrum], num_params: int
) -> dict[str, int]:
    costs = {name: _cost(factors) for name, factors in adapter.factors.items()}
    least = sum(costs.values()) + sum(
        f.magnitude.numel() for f in adapter.factors.values() if f.magnitude is not None
    )
    if least > num_params:
        raise SpecError(
            "the budget does not pay for rank 1 at every site",
            where="budget",
            expected=f"at least {format_count(least)} parameters for {len(costs)} sites",
            found=f"{format_count(num_params)} parameters",
        )
    left = num_params - least
    kept = dict.fromkeys(spectra, 1)
    values = {name: parts[1].square() for name, parts in spectra.items()}
    queue = [
        (-float(v[1]) / costs[name], place, name)
        for place, (name, v) in enumerate(values.items())
        if len(v) > 1
    ]
    heapq.heapify(queue)
    while queue:
        gain, place, name = heapq.heappop(queue)
        if costs[name] > left or not gain:
            continue
        kept[name] += 1
        left -= costs[name]
        if kept[name] < len(values[name]):
            following = -float(values[name][kept[name]]) / costs[name]
            heapq.heappush(queue, (following, place, name))
    return kept


def _by_energy(spectra: Mapping[str, _Spectrum], energy: float) -> dict[str, int]:
    squares = {name: parts[1].square() for name, parts in spectra.items()}
    every = torch.cat(list(squares.values())).sort(descending=True).values
    total = float(every.sum())
    if not total:
        return dict.fromkeys(spectra, 1)
    enough = every.cumsum(0) >= energy * total * (1 - 1e-12)
    smallest = every[int(enough.int().argmax())]
    # Rounding noise behind the last true direction is not kept for a share of 1.
    floor = max(float(smallest), 1e-14 * float(every[0]))
    return {name: max(1, int((values >= floor).sum())) for name, values in squares.items()}


def _cut(factors: Factors, spectrum: _Spectrum, r: int) -> Factors:
    if r == factors.r:
        return factors
    left, values, right = spectrum
    # The scaling stays outside, so sigma is shared out without it.
    root = (values[:r] / abs(factors.scaling)).sqrt()
    A = (root[:, None] * right[:, :r].T).to(factors.A.dtype)
    B = (left[:, :r] * root).to(factors.B.dtype)
    return replace(
        factors,
        A=A.reshape(r, *factors.A.shape[1:]).contiguous(),
        B=B.reshape(factors.B.shape[0], r, *factors.B.shape[2:]).contiguous(),
    )


def _with(adapter: Adapter, factors: Mapping[str, Factors], num_params: int) -> Adapter:
    """The adapter with other factors, its spec saying their ranks and alphas."""
    rule = adapter.spec.scaling
    right = {name: replace(f, alpha=alpha_for(f.scaling, f.r, rule)) for name, f in factors.items()}
    # Of two names that end alike the longer one must be asked first.
    names = sorted(right, key=lambda name: (-len(name), name))
    spec = replace(
        adapter.spec,
        r=max(f.r for f in right.values()),
        init="gaussian",
        rank_pattern={name: right[name].r for name in names},
        alpha_pattern={name: right[name].alpha for name in names},
    )
    ranks = {name: f.r for name, f in adapter.factors.items()}
    passport = {**adapter.passport, "pruned_from": {"num_params": num_params, "ranks": ranks}}
    return replace(adapter, spec=spec, factors=right, passport=passport)
