"""Each way to compose, at one site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lorakit.adapters.composition.recipe import WAYS, Recipe
from lorakit.adapters.composition.sites import CommonSite, Term
from lorakit.math.sparsify import (
    agreeing_sum,
    drop_and_rescale,
    keep_largest,
    slerp_weights,
    weighted_sum,
)
from lorakit.math.subspace import inner_product
from lorakit.math.truncate import Truncated, truncate_dense, truncate_product


@dataclass(frozen=True, slots=True)
class Held:
    """What an adapter of the wanted rank holds of a site's wanted change.

    Attributes:
        A: (r, in).
        B: (out, r).
        scaling: the change is `scaling` B A.
        norm: ||wanted change||_F.
        error: ||wanted change - what is held||_F.
        untouched: whether A, B and the scaling are one part's own, bit for bit.
    """

    A: Tensor
    B: Tensor
    scaling: float
    norm: float
    error: float
    untouched: bool = False


def combine(site: CommonSite, recipe: Recipe, total: float) -> Held:
    """Compose what the parts do at one site.

    Args:
        site: the terms.
        recipe: the way and its options.
        total: the sum of |weight| over all parts, also those that are not at this site.
    """
    alone = _untouched(site, recipe)
    if alone is not None:
        return alone
    if WAYS[recipe.how].dense:
        wanted = _DENSE[recipe.how](site, recipe, total)
        return _held(truncate_dense(wanted, recipe.r or _sum_of_ranks(site)))
    if recipe.how == "slerp":
        site = _on_the_sphere(site)
    if any(term.dense is not None for term in site.terms):
        return _with_dense(site, recipe)
    if recipe.how == "cat":
        return _stacked(site.terms)
    B, A = _product(site.terms)
    return _held(truncate_product(B, A, recipe.r))


def _untouched(site: CommonSite, recipe: Recipe) -> Held | None:
    """Weight 1 of one adapter is that adapter, where nothing is thinned out or cut off."""
    term = site.terms[0]
    source = term.source
    if len(site.terms) > 1 or term.weight != 1 or source is None or term.dense is not None:
        return None
    if recipe.kept < 1 or (recipe.r is not None and recipe.r < term.A.shape[0]):
        return None
    if recipe.how in ("slerp", "ties", "dare_ties"):
        return None  # what the other parts weigh counts, also where they do nothing
    norm = truncate_product(term.B, term.A).norm * abs(term.scaling)
    return Held(term.A, term.B, term.scaling, norm, 0.0, untouched=True)


def _held(found: Truncated) -> Held:
    return Held(found.A, found.B, 1.0, found.norm, found.error)


def _product(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """B and A of the weighted sum of low-rank changes, float64."""
    pairs = [term.product() for term in terms]
    return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])


def _stacked(terms: Sequence[Term]) -> Held:
    """The sum with every factor as it is; only B is scaled, and only where weights ask for it.

    What is scaled is float32: rounded to a half-precision part's own dtype it would not be exact.
    """
    scaling = terms[0].scaling
    factors = [term.weight * (term.scaling / scaling) for term in terms]
    blocks = [
        term.B if factor == 1 else (term.B.double() * factor).float()
        for term, factor in zip(terms, factors, strict=True)
    ]
    # One dtype for both: float32 holds a half-precision A as it is.
    dtype = reduce(torch.promote_types, (t.dtype for t in (*blocks, *(term.A for term in terms))))
    B = torch.cat(blocks, dim=1).to(dtype)
    A = torch.cat([term.A for term in terms]).to(dtype)
    norm = max(0.0, inner_product((B, A), (B, A))) ** 0.5 * abs(scaling)
    return Held(A, B, scaling, norm, 0.0)


def _with_dense(site: CommonSite, recipe: Recipe) -> Held:
    changes = [term.matrix() for term in site.terms]
    wanted = weighted_sum(changes, [term.weight for term in site.terms])
    return _held(truncate_dense(wanted, recipe.r or _sum_of_ranks(site)))


def _on_the_sphere(site: CommonSite) -> CommonSite:
    """The same terms with the weights of spherical interpolation."""
    if len(site.terms) < 2:
        return site
    first, second = site.terms
    t = second.weight / (first.weight + second.weight)
    one, two = slerp_weights(_cosine(first, second), t)
    return replace(site, terms=(replace(first, weight=one), replace(second, weight=two)))


def _cosine(first: Term, second: Term) -> float:
    if first.dense is not None or second.dense is not None:
        one, two = first.matrix().flatten().double(), second.matrix().flatten().double()
        norms = float(one.norm() * two.norm())
        return float(one @ two) / norms if norms else 1.0
    one, two = (replace(term, weight=1.0).product() for term in (first, second))
    square = inner_product(one, one) * inner_product(two, two)
    return inner_product(one, two) / square**0.5 if square > 0 else 1.0


def _sum_of_ranks(site: CommonSite) -> int:
    return sum(term.A.shape[0] for term in site.terms)


def _magnitude(site: CommonSite, recipe: Recipe, total: float) -> Tensor:
    return weighted_sum(_largest(site, recipe), [term.weight for term in site.terms])


def _ties(site: CommonSite, recipe: Recipe, total: float) -> Tensor:
    return agreeing_sum(_largest(site, recipe), [term.weight for term in site.terms], total)


def _dare(site: CommonSite, recipe: Recipe, total: float) -> Tensor:
    return weighted_sum(_at_random(site, recipe), [term.weight for term in site.terms])


def _dare_ties(site: CommonSite, recipe: Recipe, total: float) -> Tensor:
    return agreeing_sum(_at_random(site, recipe), [term.weight for term in site.terms], total)


_DENSE: dict[str, Callable[[CommonSite, Recipe, float], Tensor]] = {
    "ties": _ties,
    "magnitude": _magnitude,
    "dare": _dare,
    "dare_ties": _dare_ties,
}


def _largest(site: CommonSite, recipe: Recipe) -> list[Tensor]:
    return [keep_largest(term.matrix(), recipe.kept) for term in site.terms]


def _at_random(site: CommonSite, recipe: Recipe) -> list[Tensor]:
    """The choice depends on the seed, the site and the part: not on which sites came before."""
    changes: list[Tensor] = []
    for term in site.terms:
        text = f"{recipe.seed} {site.name} {term.part}"
        digest = hashlib.sha256(text.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        changes.append(drop_and_rescale(term.matrix(), recipe.kept, generator))
    return changes
