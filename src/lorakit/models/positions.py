"""How many positions a model has, and where it begins to count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What transformers calls a learned table of positions.
_TABLES = ("wpe", "position_embeddings", "embed_positions")


def position_tables(model: nn.Module) -> list[nn.Embedding]:
    """The learned tables of positions, in the model's order; works on the meta device."""
    return [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding)
    ]


def first_position(model: nn.Module) -> int:
    """The number of a row's first position: 0, or behind the padding index of the table.

    RoBERTa, CamemBERT, MPNet and their like number real tokens from padding_idx + 1 on, so that as
    many rows of the table are never used. OPT's table has two rows more than it says, and adds them
    itself.
    """
    paddings = [table.padding_idx for table in position_tables(model)]
    return next((padding + 1 for padding in paddings if padding is not None), 0)


def num_positions(model: PreTrainedModel) -> int | None:
    """The most tokens the model has positions for; None where there is no end (T5, ALiBi)."""
    text = model.config.get_text_config()
    values: Mapping[str, Any] = text.to_dict()
    # GPT-2 and others keep it under another name that an attribute map knows.
    most = values.get(text.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    if not isinstance(most, int) or most < 1:
        return None
    return most - first_position(model)
