"""The section `adalora` of a training config: how ranks move while the adapter learns."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakit.adapters.spec import MOVING, LoraSpec
from lorakit.errors import ConfigError
from lorakit.train.data_section import require


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class AdaLoraSection:
    """AdaLoRA's schedule and penalty (Zhang et al. 2023, arXiv 2303.10512).

    Raises:
        ConfigError: a value out of range.
    """

    start: float = field(
        default=1.5, metadata=_help("rank to begin with, as a multiple of the equal rank")
    )
    warmup: float = field(
        default=0.1, metadata=_help("share of the steps before the first direction is cut off")
    )
    final: float = field(
        default=0.3, metadata=_help("share of the steps, at the end, with the ranks settled")
    )
    every: int = field(
        default=10, metadata=_help("steps from one choice of the directions to the next")
    )
    orthogonality: float = field(
        default=0.5,
        metadata=_help(
            "weight of ||P^T P - I||^2 + ||Q Q^T - I||^2, a mean over all P and Q, in the loss"
        ),
    )
    betas: tuple[float, float] = field(
        default=(0.85, 0.85), metadata=_help("smoothing of the sensitivity and its uncertainty")
    )

    def __post_init__(self) -> None:
        require(self.start >= 1, "adalora.start", ">= 1", self.start)
        for name, share in (("warmup", self.warmup), ("final", self.final)):
            require(0 <= share < 1, f"adalora.{name}", "0 <= share < 1", share)
        both = self.warmup + self.final
        require(both < 1, "adalora.warmup and adalora.final", "less than 1 together", both)
        require(self.every >= 1, "adalora.every", ">= 1", self.every)
        require(self.orthogonality >= 0, "adalora.orthogonality", ">= 0", self.orthogonality)
        for beta in self.betas:
            require(0 < beta < 1, "adalora.betas", "two numbers, 0 < beta < 1", beta)

    def check(self, lora: LoraSpec, *, ratio: float | None, time: float | None) -> None:
        """Refuse what does not combine.

        Args:
            lora: the adapter.
            ratio: LoRA+'s, or None.
            time: the minutes a run is ended after, or None.

        Raises:
            ConfigError: with the key that means nothing here.
        """
        if lora.ranks != MOVING:
            if self != AdaLoraSection():
                raise ConfigError(
                    "the section adalora is for ranks that move",
                    where="adalora",
                    expected="lora.ranks: adalora, with lora.r: auto and a budget",
                    found=f"lora.ranks: {lora.ranks}",
                    remedy="remove the section, or set them",
                )
            return
        for where, value, why in (
            ("train.lora_plus_ratio", ratio, "LoRA+ is about a B that starts at zero"),
            ("train.max_minutes", time, "the ranks settle by the number of steps"),
        ):
            if value is not None:
                raise ConfigError(
                    f"it cannot go with lora.ranks: adalora: {why}",
                    where=where,
                    expected="null",
                    found=f"{value:g}",
                    remedy="remove it, or choose other ranks",
                )
