"""What one adapter does to each weight: size, spectrum, amplification, intruders."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.analysis.updates import Update
from lorakit.math.subspace import (
    intruders,
    projected_norm,
    random_directions,
    subspace_similarity,
)
from lorakit.math.svd import effective_rank, numerical_rank, stable_rank

NUM_LEADING = 10
INTRUDER_THRESHOLD = 0.5
# The share of W0's directions that appendix H.3 of the paper compares with.
TOP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """The change of one weight.

    Attributes:
        r: the rank of the factors.
        norm: ||dW||_F.
        singular_values: of dW, descending; all of LoRA's r, the leading ones of DoRA's.
        rank: how many are above rounding noise.
        effective_rank: exp of the spectrum's entropy (Roy and Vetterli 2007).
        stable_rank: ||dW||_F^2 / ||dW||_2^2.
        directions_for_90: how many directions hold 90 % of ||dW||_F^2.
    """

    r: int
    norm: float
    singular_values: list[float]
    rank: int
    effective_rank: float
    stable_rank: float
    directions_for_90: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Amplification:
    """Table 7 of the paper for one weight; each number is ||U^T W0 V^T||_F.

    Attributes:
        r: how many directions.
        of_update: along the directions of dW.
        of_base: along W0's own leading directions.
        of_random: along random ones.
        base_norm: ||W0||_F.
        update_norm: ||dW||_F.
        factor: ||dW||_F / of_update, how much the update amplifies what W0 has there; None where W0
            has nothing there.
        overlap: phi of dW's leading right directions and the leading tenth of W0's (H.3).
    """

    r: int
    of_update: float
    of_base: float
    of_random: float
    base_norm: float
    update_norm: float
    factor: float | None
    overlap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Intruders:
    """Leading directions of W0 + dW that are like none of W0's (Shuttleworth et al. 2024).

    Attributes:
        positions: which of the leading ones, 0 for the first.
        looked_at: how many were.
        threshold: the cosine below which a direction is new.
    """

    positions: list[int]
    looked_at: int
    threshold: float


def spectrum(update: Update) -> Spectrum:
    """The size and spectrum of one update."""
    values = update.svd[1]
    shown = values if not update.magnitude else values[: update.svd[0].shape[1]]
    squares = values.square()
    held = squares.cumsum(0) / squares.sum().clamp(min=1e-300)
    empty = not bool(squares.sum() > 0)
    return Spectrum(
        r=update.r,
        norm=float(values.norm()),
        singular_values=shown.tolist(),
        rank=numerical_rank(values),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        directions_for_90=0 if empty else int((held < 0.9).sum()) + 1,
    )


class WeightView:
    """W0 of one site with its singular directions, computed once for all that is asked.

    Args:
        weight: W0, (out, in) float32.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.left, self.values, rows = torch.linalg.svd(weight, full_matrices=False)
        self.right = rows.T

    def amplification(self, update: Update, r: int, *, generator: torch.Generator) -> Amplification:
        """Table 7 for this weight.

        Args:
            update: the change of this weight.
            r: how many directions; fewer are taken where the update has fewer. An update that is
                zero has none: W0's own and random ones are then taken as many as were asked for.
            generator: of the random directions.
        """
        left, values, right = update.svd
        kept = min(r, numerical_rank(values), left.shape[1])
        num_rows, num_columns = self.weight.shape
        size = kept or min(r, num_rows, num_columns)
        chance = (
            random_directions(num_rows, size, generator=generator),
            random_directions(num_columns, size, generator=generator),
        )
        along = projected_norm(self.weight, left[:, :kept], right[:, :kept]) if kept else 0.0
        norm = float(values.norm())
        leading = max(1, round(TOP_SHARE * len(self.values)))
        shared = subspace_similarity(right[:, :kept], self.right[:, :leading])
        return Amplification(
            r=size,
            of_update=along,
            of_base=float(self.values[:size].norm()),
            of_random=projected_norm(self.weight, *chance),
            base_norm=float(self.values.norm()),
            update_norm=norm,
            factor=norm / along if along > 0 else None,
            overlap=float(shared[-1, -1]) if kept else 0.0,
        )

    def intruders(self, update: Update) -> Intruders:
        """The new directions among the leading ones of W0 + dW."""
        tuned, _, _ = torch.linalg.svd(self.weight + update.dense(), full_matrices=False)
        looked_at = min(NUM_LEADING, tuned.shape[1])
        return Intruders(
            positions=intruders(self.left, tuned, largest=looked_at, threshold=INTRUDER_THRESHOLD),
            looked_at=looked_at,
            threshold=INTRUDER_THRESHOLD,
        )


def to_json(found: Spectrum | Amplification | Intruders) -> dict[str, Any]:
    """Plain JSON values."""
    return asdict(found)
