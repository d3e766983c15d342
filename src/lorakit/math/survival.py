"""How much of a wanted change is left after a weight was rounded to what its storage can hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Survival:
    """What became of a change D of a weight that was W before and is W' after.

    Attributes:
        share: <W' - W, D> / ||D||^2: 1 where the change arrives whole, on average over the
            numbers; 0 where the storage rounds it away.
        relative_error: ||W' - (W + D)|| / ||D||: what is wrong, in units of the change.
        delta_norm: ||D||, Frobenius.
    """

    share: float
    relative_error: float
    delta_norm: float


def survival(before: Tensor, after: Tensor, delta: Tensor) -> Survival:
    """Measure what became of a change.

    Args:
        before: W, as the storage holds it; float32 or wider.
        after: W', as the storage holds it; same shape.
        delta: D, the wanted change; same shape.
    """
    wanted = delta.double()
    actual = after.double() - before.double()
    square = float((wanted * wanted).sum())
    if not square:
        return Survival(share=1.0, relative_error=0.0, delta_norm=0.0)
    return Survival(
        share=float((actual * wanted).sum()) / square,
        relative_error=float((actual - wanted).norm()) / square**0.5,
        delta_norm=square**0.5,
    )


def overall(parts: list[Survival]) -> Survival | None:
    """Several changes as one, weighted by their squared norms; None where nothing changes."""
    square = sum(part.delta_norm**2 for part in parts)
    if not square:
        return None
    error_square = sum((part.relative_error * part.delta_norm) ** 2 for part in parts)
    return Survival(
        share=sum(part.share * part.delta_norm**2 for part in parts) / square,
        relative_error=(error_square / square) ** 0.5,
        delta_norm=square**0.5,
    )
