"""What to do with the parts: the ways to compose, and their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.strict import not_finite
from lorakit.errors import AdapterFileError, SpecError, unknown_name

DEFAULT_DENSITY = 0.5
# Beyond, a sum may not fit into float32.
_LARGEST_WEIGHT = 1e6
_NUM_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compose.

    Attributes:
        about: what it computes.
        dense: whether it works number by number, so that its result is no longer of low rank and
            is approximated.
        thins: whether it takes a density.
    """

    about: str
    dense: bool = False
    thins: bool = False


WAYS: dict[str, Way] = {
    "cat": Way("the weighted sum of the changes, exactly: factors stacked, ranks added"),
    "linear": Way("the same sum, in the smallest rank that holds it; in rank r if one is given"),
    "task_arithmetic": Way("linear with any weights: a negative one takes a task away"),
    "svd": Way("the best approximation of the sum at rank r"),
    "slerp": Way("two parts, interpolated on the sphere site by site; weights sum to 1"),
    "ties": Way(
        "keep the largest numbers, elect a sign, average what agrees", dense=True, thins=True
    ),
    "magnitude": Way("keep the largest numbers of each part, then add", dense=True, thins=True),
    "dare": Way(
        "keep numbers at random, rescaled to the same mean, then add", dense=True, thins=True
    ),
    "dare_ties": Way(
        "keep numbers at random, rescaled, then elect a sign as TIES", dense=True, thins=True
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How parts become one adapter.

    Attributes:
        how: a key of `WAYS`.
        r: the rank of the result; None for the exact one, and for the ways that work number by
            number the sum of the parts' ranks.
        density: the share of numbers that is kept, for the ways that thin out; None for 0.5.
        seed: of the random choice in dare and dare_ties.
        any_base: compose adapters whose passports name different bases.

    Raises:
        SpecError: an unknown way, or an option that this way cannot have.
    """

    how: str = "cat"
    r: int | None = None
    density: float | None = None
    seed: int = 0
    any_base: bool = False

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise unknown_name(
                SpecError,
                f"there is no way to compose named {self.how!r}",
                self.how,
                WAYS,
                where="how",
            )
        self._check_rank()
        self._check_density()

    def _check_rank(self) -> None:
        if self.r is None:
            if self.how == "svd":
                raise SpecError(
                    "svd needs a rank", where="r", remedy="give r, or use how='linear' or 'cat'"
                )
            return
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise SpecError(
                "the rank must be a whole number of at least 1", where="r", found=repr(self.r)
            )
        if self.how == "cat":
            raise SpecError(
                "cat keeps every factor: its rank is the sum of the parts' ranks",
                where="r",
                found=repr(self.r),
                remedy="leave r out, or use how='svd' for the best approximation at rank r",
            )

    def _check_density(self) -> None:
        if self.density is None:
            return
        if not WAYS[self.how].thins:
            raise SpecError(
                f"{self.how} keeps every number: it takes no density",
                where="density",
                found=repr(self.density),
                expected=", ".join(name for name, way in WAYS.items() if way.thins),
            )
        if not 0 < self.density <= 1:
            raise SpecError(
                "the density is a share of the numbers",
                where="density",
                expected="0 < density <= 1",
                found=repr(self.density),
            )

    @property
    def kept(self) -> float:
        """The share of numbers that is kept."""
        if not WAYS[self.how].thins:
            return 1.0
        return DEFAULT_DENSITY if self.density is None else self.density


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """One adapter of a composition.

    Attributes:
        name: what messages, tables and the passport call it.
        adapter: the adapter.
        weight: what its change is multiplied by.
    """

    name: str
    adapter: Adapter
    weight: float


def check_parts(parts: Sequence[Part], recipe: Recipe) -> list[Part]:
    """The parts that count: those whose weight is not zero.

    Raises:
        SpecError: nothing is left, a weight is not a number, or the way takes other parts.
        AdapterFileError: a part that counts has a number that is not finite.
    """
    for part in parts:
        if not isinstance(part.weight, int | float) or not abs(part.weight) <= _LARGEST_WEIGHT:
            raise SpecError(
                "a weight must be a finite number",
                where=part.name,
                expected=f"from -{_LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}",
                found=repr(part.weight),
            )
    if recipe.how == "slerp":
        weights = [part.weight for part in parts]
        if len(parts) != 2 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise SpecError(
                "slerp goes from one adapter to another",
                where="weights",
                expected="two parts, weights from 0 to 1 that sum to 1",
                found=", ".join(f"{part.name}={part.weight:g}" for part in parts),
            )
    counting = [part for part in parts if part.weight]
    if not counting:
        raise SpecError(
            "nothing is left to compose",
            where="weights",
            expected="at least one adapter with a weight that is not zero",
            found=", ".join(f"{part.name}={part.weight:g}" for part in parts) or "no adapter",
        )
    for part in counting:
        _require_finite(part)
    if not is_identity(counting, recipe):
        _require_rank_for_dora(counting, recipe)
    return counting


def is_identity(parts: Sequence[Part], recipe: Recipe) -> bool:
    """One adapter at weight 1, nothing thinned out, nothing cut off: also DoRA stays what it is."""
    if len(parts) != 1 or parts[0].weight != 1 or recipe.kept < 1:
        return False
    return recipe.r is None or all(f.r <= recipe.r for f in parts[0].adapter.factors.values())


def _require_rank_for_dora(parts: Sequence[Part], recipe: Recipe) -> None:
    dora = [part.name for part in parts if part.adapter.spec.update == "dora"]
    if dora and recipe.r is None and not WAYS[recipe.how].dense:
        raise SpecError(
            "a DoRA adapter changes the length of every row: its change is not of low rank, and no "
            "exact sum with it is",
            where=", ".join(dora),
            expected="a rank to approximate the sum at",
            remedy="give r, with how='svd' or another way than cat; the error is reported",
        )


def _require_finite(part: Part) -> None:
    problems = not_finite(part.adapter)
    if problems:
        more = [f"... and {len(problems) - _NUM_SHOWN} more"] if len(problems) > _NUM_SHOWN else []
        raise AdapterFileError(
            "a NaN or an infinity in one part would be everywhere in the result",
            where=part.name,
            found="\n".join([*problems[:_NUM_SHOWN], *more]),
            remedy="leave the part out (weight 0), or take an earlier checkpoint of its run",
        )
