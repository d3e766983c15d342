"""The repeated blocks of a model, and the same model with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# What a block looks like: every parameter with its shape, and whether it is learned.
_Look = tuple[tuple[str, tuple[int, ...], bool], ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a model that repeat.

    Attributes:
        name: of the list that holds them.
        count: how many.
        period: after how many blocks the same parameters come again; 1 where all are alike.
    """

    name: str
    count: int
    period: int


def repeated_blocks(model: PreTrainedModel) -> Blocks | None:
    """The model's blocks, or None where they do not repeat (or are not found).

    Args:
        model: a method attached or not; blocks that learn something else are not alike.
    """
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1 or count < 2:
        return None
    name, blocks = lists[0]
    looks = [_look(block) for block in blocks]
    period = _period(looks)
    return None if period is None else Blocks(name=name, count=count, period=period)


def shortened(model: PreTrainedModel, blocks: Blocks, count: int) -> PreTrainedModel:
    """A copy of a model on the meta device with its first `count` blocks alone."""
    whole = model.get_submodule(blocks.name)
    kept = nn.ModuleList(list(whole.children())[:count])
    kept.train(whole.training)
    # deepcopy takes what stands in its memo for the copy: first copy the short list alone.
    memo: dict[int, object] = {}
    memo[id(whole)] = copy.deepcopy(kept, memo)
    short = copy.deepcopy(model, memo)
    short.config.get_text_config().num_hidden_layers = count
    return short


def _look(block: nn.Module) -> _Look:
    return tuple((n, tuple(p.shape), p.requires_grad) for n, p in block.named_parameters())


def _period(looks: Sequence[_Look]) -> int | None:
    for period in range(1, len(looks) // 2 + 1):
        if all(looks[i] == looks[i - period] for i in range(period, len(looks))):
            return period
    return None
