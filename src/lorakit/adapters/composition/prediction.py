"""How much the parts will get into each other's way, said before anything is composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.composition.recipe import Part, Recipe, check_parts
from lorakit.adapters.composition.sites import Term, common_sites
from lorakit.math.interference import Interference, interference
from lorakit.math.truncate import truncate_dense
from lorakit.progress import track


@dataclass(frozen=True, slots=True)
class SitePair:
    """Two parts at one site."""

    site: str
    first: str
    second: str
    found: Interference

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "site": self.site,
            "first": self.first,
            "second": self.second,
            **asdict(self.found),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """Two parts over all sites that both change, sites weighted by the product of their norms.

    Attributes:
        first, second: the parts.
        shared_sites: sites that both change.
        all_sites: sites that either changes.
        mean: the weighted mean over the shared sites, or None without any.
    """

    first: str
    second: str
    shared_sites: int
    all_sites: int
    mean: Interference | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def predict_interference(
    parts: Sequence[Part], recipe: Recipe, *, base: nn.Module | None = None
) -> tuple[list[Prediction], list[SitePair]]:
    """Measure every pair of parts at every site that both change, weights included.

    Of a DoRA part its change is taken at the rank of its factors.

    Args:
        parts: the adapters; those of weight 0 do not count.
        recipe: how they will be composed.
        base: the model, where an adapter is DoRA.

    Raises:
        SpecError, BaseMismatchError: see `lorakit.adapters.composition.compose.compose`.
    """
    counting = check_parts(parts, recipe)
    if len(counting) < 2:
        return [], []  # also a DoRA part alone, whose change nobody asks for
    sites = common_sites(counting, base)
    pairs: list[SitePair] = []
    for site in track(sites, "predicting interference"):
        products = [_product(term) for term in site.terms]
        for i, first in enumerate(site.terms):
            for j in range(i + 1, len(site.terms)):
                found = interference(products[i], products[j])
                if found is not None:
                    names = counting[first.part].name, counting[site.terms[j].part].name
                    pairs.append(SitePair(site.name, *names, found))
    predictions: list[Prediction] = []
    for i, first in enumerate(counting):
        for j in range(i + 1, len(counting)):
            second = counting[j].name
            mine = [p.found for p in pairs if (p.first, p.second) == (first.name, second)]
            either = sum(any(term.part in (i, j) for term in site.terms) for site in sites)
            predictions.append(
                Prediction(first.name, second, len(mine), either, _mean(mine) if mine else None)
            )
    return predictions, pairs


def _product(term: Term) -> tuple[Tensor, Tensor]:
    if term.dense is None:
        return term.product()
    found = truncate_dense(term.dense, term.A.shape[0])
    return found.B.double() * term.weight, found.A.double()


def _mean(found: Sequence[Interference]) -> Interference:
    total = sum(one.strength for one in found)

    def mean(values: Sequence[float]) -> float:
        pairs = zip(values, found, strict=True)
        return sum(value * one.strength for value, one in pairs) / total

    return Interference(
        overlap_in=mean([one.overlap_in for one in found]),
        overlap_out=mean([one.overlap_out for one in found]),
        chance_in=mean([one.chance_in for one in found]),
        chance_out=mean([one.chance_out for one in found]),
        cosine=mean([one.cosine for one in found]),
        sign_conflict=mean([one.sign_conflict for one in found]),
        strength=total,
    )
