"""Before the first step: an adapter whose start is taken from data looks at some batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.data_init import initialise_from_data
from lorakit.adapters.data_ranks import ChosenRanks, choose_ranks
from lorakit.adapters.spec import DATA_INITS, DATA_RANKS, LoraSpec
from lorakit.formats.peft import read_adapter
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.train.objectives.base import ExampleSet


def start_from_data(
    method: Method,
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
) -> int:
    """Give an attached adapter with init "eva" or "lora_ga" its start; others are left alone.

    Returns:
        The number of batches seen; 0 where the adapter starts otherwise.

    Raises:
        DataError: the batches say too little for the rank.
    """
    if not isinstance(method, LoraMethod) or method.spec.init not in DATA_INITS:
        return 0
    device = next(model.parameters()).device
    moved = ({name: value.to(device) for name, value in batch.items()} for batch in batches)
    return initialise_from_data(model, method.adapter_name, moved)


def ranks_from_data(
    method: Method,
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
) -> ChosenRanks | None:
    """Choose the ranks of a method with `lora.r: auto` before it is attached, and tell it.

    Returns:
        The ranks; None where they are given, equal, or move while it learns.

    Raises:
        DataError: the batches say nothing about a layer.
        SpecError: a target that is no linear layer.
    """
    if not isinstance(method, LoraMethod) or method.spec.ranks not in DATA_RANKS:
        return None
    device = next(model.parameters()).device
    moved = ({name: value.to(device) for name, value in batch.items()} for batch in batches)
    chosen = choose_ranks(model, method.spec, moved)
    method.spec = chosen.spec
    return chosen


def keep_ranks(method: Method, adapter: Path) -> None:
    """Give a method whose ranks the data chose those of an adapter that it saved."""
    if not isinstance(method, LoraMethod) or method.spec.ranks not in DATA_RANKS:
        return
    saved = read_adapter(adapter)
    trained = saved.passport.get("trained_as")
    method.spec = saved.spec if trained is None else LoraSpec.from_dict(trained)


def first_batches(
    examples: ExampleSet,
    collate: Callable[[Sequence[Any]], Any],
    *,
    num_batches: int,
    batch_size: int,
    seed: int,
) -> Iterator[Any]:
    """Batches of rows drawn without repetition; the same ones for the same seed."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    for start in range(0, min(len(order), num_batches * batch_size), batch_size):
        chosen = order[start : min(start + batch_size, num_batches * batch_size)]
        yield collate([examples[i] for i in chosen])
