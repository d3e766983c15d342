"""Two adapters side by side: the subspaces they share, and where their changes agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.analysis.updates import Source, Update
from lorakit.errors import RequestError
from lorakit.math.interference import dense_sign_conflict
from lorakit.math.subspace import (
    chance_similarity,
    inner_product,
    random_directions,
    subspace_similarity,
)
from lorakit.math.svd import numerical_rank

Of = Literal["A", "B", "delta-in", "delta-out"]
OFS: tuple[Of, ...] = ("A", "B", "delta-in", "delta-out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """Figures 3 and 4 of the paper for one site.

    Attributes:
        site: its name.
        of: whose directions are compared.
        phi: (r1, r2), entry [i - 1, j - 1] for the leading i and j directions.
        control: the same of two Gaussian matrices of the same sizes.
        first: phi(1, 1), of the leading directions alone.
        whole: phi(r1, r2), of all directions.
        chance: what random subspaces would have for `whole`: max(r1, r2) / d.
    """

    site: str
    of: Of
    phi: Tensor
    control: Tensor
    first: float
    whole: float
    chance: float

    @property
    def d(self) -> int:
        """The size of the space that the directions are in."""
        return round(max(self.phi.shape) / self.chance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Whether two adapters change one weight in the same way.

    Attributes:
        site: its name.
        norms: ||dW1||_F and ||dW2||_F.
        cosine: <dW1, dW2> / (||dW1|| ||dW2||): 1 the same direction, -1 opposite, 0 unrelated.
        inputs: phi of the right directions: whether both read the same.
        outputs: phi of the left directions: whether both write the same.
        sign_conflict: as `lorakit compose` predicts it: over all numbers, each counted with the
            smaller of the two magnitudes, the share where the signs differ; 0.5 is chance.
    """

    site: str
    norms: tuple[float, float]
    cosine: float
    inputs: float
    outputs: float
    sign_conflict: float


def common_sites(first: Source, second: Source) -> list[str]:
    """The sites that both adapters change.

    Raises:
        RequestError: none, or weights of different shapes.
    """
    common = [site for site in first.updates if site in second.updates]
    if not common:
        raise RequestError(
            "the two adapters have no site in common",
            where=f"{first.label} and {second.label}",
            expected="adapters of the same base and targets",
            found=f"{next(iter(first.updates))}, ... and {next(iter(second.updates))}, ...",
        )
    for site in common:
        shapes = first.updates[site].shape, second.updates[site].shape
        if shapes[0] != shapes[1]:
            raise RequestError(
                "the two adapters were made for weights of different shapes",
                where=site,
                expected=f"out x in = {shapes[0][0]} x {shapes[0][1]}",
                found=f"{shapes[1][0]} x {shapes[1][1]}",
                remedy="give two adapters of the same base",
            )
    return common


def directions(update: Update, of: Of) -> Tensor:
    """The orthonormal directions of a site that are compared, (d, n) float64, leading first.

    "A": the right singular vectors of A, as the paper has it. "B": the left ones of B. "delta-in"
    and "delta-out": the right and left ones of dW, which do not depend on how dW is split into B
    and A. Directions below rounding noise are left out; n is 0 for an update that is zero.

    Raises:
        StateError: the change of a DoRA adapter without its base.
    """
    if of == "A":
        _, values, rows = torch.linalg.svd(update.A.double(), full_matrices=False)
        found = rows.T
    elif of == "B":
        found, values, _ = torch.linalg.svd(update.B.double(), full_matrices=False)
    else:
        left, values, right = update.svd
        found = right if of == "delta-in" else left
    return found[:, : numerical_rank(values)]


def similarity(
    first: Update, second: Update, of: Of, *, generator: torch.Generator
) -> Similarity | None:
    """Phi of one site; None where one of the two updates is zero.

    Args:
        first: the update of one adapter.
        second: the update of the other, of a weight of the same shape.
        of: see `directions`.
        generator: of the Gaussian control.
    """
    one, other = directions(first, of), directions(second, of)
    d, i, j = one.shape[0], one.shape[1], other.shape[1]
    if not i or not j:
        return None
    phi = subspace_similarity(one, other)
    control = subspace_similarity(
        random_directions(d, i, generator=generator), random_directions(d, j, generator=generator)
    )
    return Similarity(
        site=first.site,
        of=of,
        phi=phi,
        control=control,
        first=float(phi[0, 0]),
        whole=float(phi[-1, -1]),
        chance=chance_similarity(d, i, j),
    )


def agreement(first: Update, second: Update) -> Agreement:
    """How far two changes of one weight point the same way."""
    norms = float(first.svd[1].norm()), float(second.svd[1].norm())
    one, other = first.dense(), second.dense()
    if first.change is None and second.change is None:
        inner = (
            first.scaling * second.scaling * inner_product((first.B, first.A), (second.B, second.A))
        )
    else:
        inner = float((one.double() * other.double()).sum())
    return Agreement(
        site=first.site,
        norms=norms,
        cosine=inner / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0,
        inputs=_whole(first, second, "delta-in"),
        outputs=_whole(first, second, "delta-out"),
        sign_conflict=dense_sign_conflict(one, other),
    )


def _whole(first: Update, second: Update, of: Of) -> float:
    one, other = directions(first, of)[:, : first.r], directions(second, of)[:, : second.r]
    if not one.shape[1] or not other.shape[1]:
        return 0.0
    return float(subspace_similarity(one, other)[-1, -1])
