"""What is measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from lorakit.analysis.pairs import OFS, Of
from lorakit.errors import RequestError, unknown_name

# What can be measured, and what it needs: base (the weights), pair (two adapters), run (the
# checkpoints of a run).
MEASURES: dict[str, frozenset[str]] = {
    "spectra": frozenset(),
    "amplification": frozenset({"base"}),
    "intruders": frozenset({"base"}),
    "norms": frozenset({"run"}),
    "subspaces": frozenset({"pair"}),
    "agreement": frozenset({"pair"}),
}
_LACKING = {
    "base": ("the weights of the base", "name it: --model REF"),
    "run": (
        "a run directory with checkpoints",
        "give the output directory of lorakit train, trained with train.keep_checkpoints",
    ),
    "pair": ("two adapters", "give a second adapter"),
}


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What is measured.

    Attributes:
        measures: keys of MEASURES; None for everything that what is given allows.
        of: whose directions the subspaces compare, see `lorakit.analysis.pairs.directions`.
        sites: names, suffixes or expressions of the sites to look at; all if empty.
        directions: how many directions the amplification takes; None for each site's rank.
        any_base: accept an adapter that was trained on another base.
        seed: of everything random: the control of the subspaces, the random column of Table 7.

    Raises:
        RequestError: a name that is not known, or a number that cannot be.
    """

    measures: tuple[str, ...] | None = None
    of: Of = "A"
    sites: tuple[str, ...] = ()
    directions: int | None = None
    any_base: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.measures or ():
            if name not in MEASURES:
                raise unknown_name(
                    RequestError,
                    f"{name!r} is not something that can be measured",
                    name,
                    MEASURES,
                    where="measures",
                )
        if self.measures is not None and not self.measures:
            raise RequestError("nothing is to be measured", where="measures")
        if self.of not in get_args(Of):
            raise RequestError(
                "there are no such directions",
                where="of",
                expected=", ".join(OFS),
                found=repr(self.of),
            )
        if self.directions is not None and self.directions < 1:
            raise RequestError(
                "at least one direction must be looked at",
                where="directions",
                expected=">= 1",
                found=str(self.directions),
            )
        if not 0 <= self.seed < 2**63:
            raise RequestError(
                "the seed is out of range",
                where="seed",
                expected="0 <= seed < 2^63",
                found=str(self.seed),
            )

    def chosen(self, given: frozenset[str]) -> tuple[str, ...]:
        """What is measured with what is given: "base", "run", "pair".

        Raises:
            RequestError: something is asked for that needs more.
        """
        if self.measures is None:
            return tuple(name for name, needs in MEASURES.items() if needs <= given)
        for name in self.measures:
            for need in sorted(MEASURES[name] - given):
                expected, remedy = _LACKING[need]
                raise RequestError(
                    f"{name} cannot be measured with what is given",
                    where="measures",
                    expected=expected,
                    remedy=remedy,
                )
        return self.measures
