"""LoraSpec: the request for an adapter."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorakit.errors import SpecError, unknown_name
from lorakit.math.scaling import Scaling, lora_scaling

Update = Literal["lora", "dora"]
Init = Literal["gaussian", "kaiming", "pissa", "pissa_fast", "olora", "eva", "lora_ga"]
# Start with B A != 0: the base that is trained against is W0 - s B0 A0.
NONZERO_INITS = frozenset({"pissa", "pissa_fast", "olora", "lora_ga"})
# Start from data: `lorakit.adapters.data_init.initialise_from_data` before training.
DATA_INITS = frozenset({"eva", "lora_ga"})
Bias = Literal["none", "lora_only", "all"]
# How the ranks of r: auto are chosen.
Ranks = Literal["uniform", "eva", "gradient", "adalora"]
# Chosen before the first step: `lorakit.adapters.data_ranks.choose_ranks`.
DATA_RANKS = frozenset({"eva", "gradient"})
# Moved while the adapter learns: `lorakit.train.moving_ranks`.
MOVING = "adalora"
AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """What adapter to learn: LoRA or DoRA.

    LoRA is W0 + s B A (Hu et al. 2021, eq. 3); DoRA is m (W0 + s B A) / ||W0 + s B A||_c (Liu et
    al. 2024, eq. 5).

    Raises:
        SpecError: a value that cannot be; the message names the field.
    """

    r: int | Literal["auto"] = field(
        default=8,
        metadata={"help": "rank of the update; auto: as many as the budget pays for, see ranks"},
    )
    alpha: float = field(default=16.0, metadata={"help": "numerator of the scaling"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the branch's input, 0 to 1"})
    targets: str | tuple[str, ...] = field(
        default="qv",
        metadata={
            "help": "a preset (qv, attention, mlp, all-linear), or names, suffixes, parts of fused "
            "projections (c_attn.q), regular expressions"
        },
    )
    update: Update = field(
        default="lora", metadata={"help": "update rule: lora, or dora (magnitude and direction)"}
    )
    scaling: Scaling = field(
        default="alpha/r", metadata={"help": "alpha/r, or alpha/sqrt(r) (rsLoRA)"}
    )
    rank_pattern: Mapping[str, int] = field(
        default_factory=dict[str, int], metadata={"help": "name or regex -> rank, first match wins"}
    )
    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict[str, float],
        metadata={"help": "name or regex -> alpha, first match wins"},
    )
    init: Init = field(
        default="gaussian",
        metadata={
            "help": "how A starts: gaussian, N(0, 1/in), or kaiming, U(-1/sqrt(in), 1/sqrt(in)) "
            "as loralib and PEFT do; B starts at zero (for embeddings A does); pissa (SVD of the "
            "weight), pissa_fast (randomized SVD), olora (QR); from data: eva (SVD of the layer's "
            "inputs), lora_ga (SVD of the weight's gradient)"
        },
    )
    budget: int | str | None = field(
        default=None,
        metadata={
            "help": "with r: auto, what the updates may take: parameters (400000, 400k, 1.5M) or "
            "bytes (1.5 MB, 64 KiB)"
        },
    )
    ranks: Ranks = field(
        default="uniform",
        metadata={
            "help": "with r: auto, who gets how much: uniform (all the same), eva (where the "
            "layers' inputs spread most), gradient (where the weights' gradients do), adalora "
            "(moved while it learns, see the section adalora)"
        },
    )
    bias: Bias = field(
        default="none",
        metadata={"help": "biases trained beside: none, lora_only (of the targets), all"},
    )
    also_train: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "whole modules trained beside, by name or suffix (PEFT's modules_to_save)"
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.also_train, (str, list)):
            names = [self.also_train] if isinstance(self.also_train, str) else self.also_train
            object.__setattr__(self, "also_train", tuple(names))
        self._check_names()
        self._check_choices()
        self._check_numbers()

    def _check_names(self) -> None:
        if not isinstance(self.also_train, tuple) or not all(
            isinstance(name, str) and name for name in self.also_train
        ):
            raise SpecError(
                "also_train must be a list of names",
                where="also_train",
                found=repr(self.also_train),
            )
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        named = isinstance(targets, tuple) and all(isinstance(t, str) and t for t in targets)
        if not targets or not named:
            raise SpecError(
                "targets must name something",
                where="targets",
                expected="a preset, or one or more names",
                found=repr(self.targets),
            )

    def _check_choices(self) -> None:
        choices = {
            "update": Update,
            "scaling": Scaling,
            "init": Init,
            "bias": Bias,
            "ranks": Ranks,
        }
        for name, literal in choices.items():
            value = getattr(self, name)
            if value not in get_args(literal):
                raise SpecError(
                    f"{name} is not one of its choices",
                    where=name,
                    expected=", ".join(get_args(literal)),
                    found=repr(value),
                )

    def _check_numbers(self) -> None:
        if self.r == AUTO:
            self._check_auto()
        else:
            _check_rank("r", self.r)
            self._check_fixed()
        _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise SpecError(
                "dropout must be a probability below 1",
                where="dropout",
                expected="0 <= dropout < 1",
                found=repr(self.dropout),
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise SpecError(
                    f"{name} must map names to numbers",
                    where=name,
                    expected="{name or expression: number}",
                    found=repr(getattr(self, name)),
                )
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)

    def _check_auto(self) -> None:
        if self.budget is None:
            raise SpecError(
                "r: auto needs a budget",
                where="budget",
                expected='parameters (400000, "400k") or bytes ("1.5 MB")',
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise SpecError(
                    f"r: auto chooses the ranks, and {name} gives them",
                    where=name,
                    expected="nothing",
                    remedy=f"remove {name}, or give r a number",
                )
        for name, plain in (("update", "lora"), ("init", "gaussian")):
            if self.ranks == MOVING and getattr(self, name) != plain:
                raise SpecError(
                    "AdaLoRA learns P diag(lambda) Q from a start of its own",
                    where=name,
                    expected=plain,
                    found=getattr(self, name),
                    remedy=f"remove {name}, or choose other ranks",
                )

    def _check_fixed(self) -> None:
        for name, plain in (("budget", None), ("ranks", "uniform")):
            if getattr(self, name) != plain:
                raise SpecError(
                    f"{name} is for ranks that choose themselves",
                    where=name,
                    found=repr(getattr(self, name)),
                    remedy=f"set r: auto, or remove {name}",
                )

    def fixed_r(self) -> int:
        """The rank as a number.

        Raises:
            SpecError: r is auto, and the ranks have not been chosen yet.
        """
        if not isinstance(self.r, int):
            raise SpecError("the ranks have not been chosen yet", where="r", found="auto")
        return self.r

    def scale(self, *, r: int, alpha: float) -> float:
        """The factor in front of BA at this rank and alpha."""
        return lora_scaling(alpha, r, self.scaling)

    def doubled(self) -> LoraSpec:
        """The plain request whose factors hold [A; A0] and [B, -B0] at the same scaling."""
        more = 2.0 if self.scaling == "alpha/r" else math.sqrt(2.0)
        return dataclasses.replace(
            self,
            r=2 * self.fixed_r(),
            alpha=more * self.alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in self.alpha_pattern.items()},
            init="gaussian",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` reads them back."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["rank_pattern"] = dict(self.rank_pattern)
        values["alpha_pattern"] = dict(self.alpha_pattern)
        values["also_train"] = list(self.also_train)
        if not isinstance(self.targets, str):
            values["targets"] = list(self.targets)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSpec:
        """Read plain values.

        Raises:
            SpecError: an unknown key (with the nearest known one) or a wrong value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name(SpecError, f"unknown key {key!r}", key, known, where="LoraSpec")
        return cls(**dict(values))


def require_chosen(spec: LoraSpec) -> None:
    """Refuse to attach a spec whose ranks wait for data.

    Raises:
        SpecError: see `lorakit.adapters.data_ranks.choose_ranks`.
    """
    if spec.ranks == MOVING:
        raise SpecError(
            "the ranks of this spec move while it is trained",
            where="ranks",
            found=spec.ranks,
            remedy="train it with lorakit train, or use other ranks",
        )
    if spec.ranks != "uniform":
        raise SpecError(
            "the ranks of this spec wait for data",
            where="ranks",
            found=spec.ranks,
            remedy="attach what choose_ranks(model, spec, batches) gives, or use ranks: uniform",
        )


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # An integer beyond the largest float is no number to compute with.
    return abs(value) <= sys.float_info.max


def _check_rank(where: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(
            "the rank must be a whole number of at least 1",
            where=where,
            expected="r >= 1",
            found=repr(value),
        )


def _check_alpha(where: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise SpecError(
            "alpha must be a positive number",
            where=where,
            expected="alpha > 0",
            found=repr(value),
        )
