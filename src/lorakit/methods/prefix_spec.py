"""What the two prefix methods can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lorakit.errors import SpecError
from lorakit.methods.spec import (
    ALSO_TRAIN,
    require_choice,
    require_names,
    require_whole,
)

PrefixInit = Literal["vocabulary", "normal"]

_PREFIX = {"help": "learned positions in front of the prompt (the paper's l_p)"}
_INFIX = {"help": "learned positions behind the prompt (the paper's l_i)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixEmbeddingSpec:
    """Learn embeddings of special tokens: |Theta| = d_model (l_p + l_i) (Hu et al. 2021, 5.1).

    Raises:
        SpecError: a value that cannot be; the message names the field.
    """

    prefix: int = field(default=32, metadata=_PREFIX)
    infix: int = field(default=8, metadata=_INFIX)
    init: PrefixInit = field(
        default="vocabulary",
        metadata={
            "help": "where they start: vocabulary, at embeddings of random tokens, or normal, "
            "N(0, the embeddings' own variance)"
        },
    )
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixLayerSpec:
    """Learn the input of every block there: |Theta| = L d_model (l_p + l_i) (Hu et al. 2021, 5.1).

    Raises:
        SpecError: a value that cannot be; the message names the field.
    """

    prefix: int = field(default=8, metadata=_PREFIX)
    infix: int = field(default=0, metadata=_INFIX)
    init: PrefixInit = field(
        default="vocabulary",
        metadata={
            "help": "where they start: at the model's own activations of random tokens "
            "(vocabulary), or of embeddings from N(0, the embeddings' own variance) (normal)"
        },
    )
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        _check(self)


def _check(spec: PrefixEmbeddingSpec | PrefixLayerSpec) -> None:
    require_whole("prefix", spec.prefix, least=0)
    require_whole("infix", spec.infix, least=0)
    require_choice("init", spec.init, get_args(PrefixInit))
    require_names("also_train", spec.also_train)
    if spec.prefix + spec.infix == 0:
        raise SpecError(
            "there is no position to learn",
            where="prefix and infix",
            expected="at least 1 together",
            found="0",
            remedy="set prefix",
        )
