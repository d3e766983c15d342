"""The options of the bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lorakit.errors import SpecError
from lorakit.layers.bottleneck import Activation
from lorakit.methods.spec import ALSO_TRAIN, require_choice, require_names, require_whole

Placement = Literal["houlsby", "pfeiffer"]

_BOTTLENECK = {"help": "size r of the bottleneck, at least 1"}
_ACTIVATION = {
    "help": "nonlinearity; null: gelu for houlsby, relu for lin and pfeiffer, as published"
}
_NORMS = {
    "help": "also train the base's layer norms in the blocks that have adapters, as Houlsby et al. "
    "do; the counts of the LoRA paper are without"
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckSpec:
    """Bottleneck adapters in the blocks of a frozen model.

    Raises:
        SpecError: a value that cannot be.
    """

    bottleneck: int = field(default=64, metadata=_BOTTLENECK)
    activation: Activation | None = field(default=None, metadata=_ACTIVATION)
    blocks: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "numbers of the blocks that get adapters, the first is 0; null: all"},
    )
    train_layer_norms: bool = field(default=False, metadata=_NORMS)
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        _check_common(self)
        if self.blocks is None:
            return
        if not isinstance(self.blocks, tuple) or not self.blocks:
            raise SpecError(
                "blocks must be a list of block numbers, or null for all",
                where="blocks",
                expected="a list such as [0, 1, 2]",
                found=repr(self.blocks),
            )
        for number in self.blocks:
            require_whole("blocks", number, least=0)
        if len(set(self.blocks)) < len(self.blocks):
            raise SpecError(
                "a block is named twice",
                where="blocks",
                expected="each number once",
                found=repr(list(self.blocks)),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterDropSpec:
    """Bottleneck adapters that leave out the first blocks (AdapterDrop, Ruecklé et al. 2021).

    Raises:
        SpecError: a value that cannot be.
    """

    bottleneck: int = field(default=64, metadata=_BOTTLENECK)
    placement: Placement = field(
        default="pfeiffer", metadata={"help": "where the adapters stand: as in houlsby or pfeiffer"}
    )
    drop_first: int = field(
        default=5,
        metadata={"help": "how many blocks, counted from the input, are left without adapters"},
    )
    at_random: bool = field(
        default=False,
        metadata={
            "help": "every block has adapters, and each training step drops those of the first n, "
            "n uniform in 0..drop_first; evaluation runs all of them"
        },
    )
    activation: Activation | None = field(default=None, metadata=_ACTIVATION)
    train_layer_norms: bool = field(default=False, metadata=_NORMS)
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        _check_common(self)
        require_choice("placement", self.placement, get_args(Placement))
        require_whole("drop_first", self.drop_first, least=1)
        require_choice("at_random", self.at_random, (True, False))


def _check_common(spec: BottleneckSpec | AdapterDropSpec) -> None:
    require_whole("bottleneck", spec.bottleneck, least=1)
    require_choice("activation", spec.activation, (*get_args(Activation), None))
    require_choice("train_layer_norms", spec.train_layer_norms, (True, False))
    require_names("also_train", spec.also_train)
