"""What agrees with the paper and what does not, computed from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorakit.formatting import format_number

Verdict = Literal["agrees", "disagrees", "cannot tell"]
Relation = Literal["above", "below", "level with"]
VERDICTS: tuple[Verdict, ...] = ("agrees", "disagrees", "cannot tell")
# Layers by layer: what most of them say counts, what about half of them say does not.
_MOST = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A number and how far it may be off.

    Attributes:
        value: the number.
        spread: half the width of what rows and seeds leave open, in the same unit; 0 if unknown.
        n: seeds, or layers; None for the paper's.
    """

    value: float
    spread: float = 0.0
    n: int | None = None

    def text(self) -> str:
        """The number with its spread: 70.4 +- 0.1."""
        spread = f" ± {self.spread:.2g}" if self.spread else ""
        return f"{format_number(self.value)}{spread}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One claim, the paper's numbers, ours, and whether they say the same.

    Attributes:
        claim: what is compared.
        paper: the paper's numbers, in words.
        ours: our numbers, in words.
        verdict: agrees; disagrees; or cannot tell: our difference is within our spread, where the
            paper's is not.
        sentence: all of it as one sentence.
    """

    claim: str
    paper: str
    ours: str
    verdict: Verdict
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def relation(first: Value, second: Value) -> Relation:
    """Where the first lies; level where the difference is within both spreads together.

    The spreads are taken as independent: sqrt(s1^2 + s2^2). On the same rows they are not, and the
    true spread of the difference is smaller, so "level" is said too often rather than too rarely.
    """
    difference = first.value - second.value
    if abs(difference) <= math.hypot(first.spread, second.spread):
        return "level with"
    return "above" if difference > 0 else "below"


def compare_order(
    claim: str, names: tuple[str, str], paper: tuple[Value, Value], ours: tuple[Value, Value] | None
) -> Finding:
    """Whether two of ours stand to each other as the paper's two do.

    Args:
        claim: what is compared: a column.
        names: of the two.
        paper: the paper's numbers.
        ours: ours; None where a run did not finish.
    """
    theirs = relation(*paper)
    paper_text = f"{names[0]} {paper[0].text()} is {theirs} {names[1]} {paper[1].text()}"
    if ours is None:
        return _finding(claim, paper_text, "not measured", "cannot tell")
    mine = relation(*ours)
    ours_text = f"{names[0]} {ours[0].text()} is {mine} {names[1]} {ours[1].text()}"
    if mine == theirs:
        verdict: Verdict = "agrees"
    elif mine == "level with":
        verdict = "cannot tell"
    else:
        verdict = "disagrees"
    return _finding(claim, paper_text, ours_text, verdict)


def compare_layers(claim: str, paper: str, holds: Sequence[bool], detail: str) -> Finding:
    """Whether what the paper says of one layer holds in most of ours.

    Args:
        claim: what is said to hold.
        paper: what the paper measured.
        holds: for each of our layers, whether it does.
        detail: our numbers.
    """
    share = sum(holds) / len(holds) if holds else 0.5
    text = f"it holds in {sum(holds)} of {len(holds)} layers; {detail}"
    if share >= _MOST:
        return _finding(claim, paper, text, "agrees")
    return _finding(claim, paper, text, "disagrees" if share <= 1 - _MOST else "cannot tell")


def counts(findings: Sequence[Mapping[str, Any]]) -> dict[Verdict, int]:
    """How many findings there are of each verdict."""
    return {verdict: sum(found["verdict"] == verdict for found in findings) for verdict in VERDICTS}


def summary(findings: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on what agrees and what does not."""
    number = counts(findings)
    text = (
        f"Of {len(findings)} comparisons with the paper {number['agrees']} agree, "
        f"{number['disagrees']} disagree, and {number['cannot tell']} cannot be told"
    )
    against = [f["claim"] for f in findings if f["verdict"] == "disagrees"]
    return f"{text}; against the paper: {'; '.join(against)}." if against else f"{text}."


def _finding(claim: str, paper: str, ours: str, verdict: Verdict) -> Finding:
    words = {
        "agrees": "Ours agrees with the paper.",
        "disagrees": "Ours disagrees with the paper.",
        "cannot tell": "Ours cannot tell.",
    }
    sentence = f"{claim}. The paper: {paper}. Ours: {ours}. {words[verdict]}"
    return Finding(claim=claim, paper=paper, ours=ours, verdict=verdict, sentence=sentence)
