"""Which models take packed batches, and a batch made into one.

See `lorakit.layers.packed`. A model is known to take one when it numbers tokens by `position_ids`
and lets them see each other in attention alone, and its attention is this package's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.attach import active_adapter
from lorakit.adapters.attachments import find_attachments
from lorakit.layers.low_rank import LowRank
from lorakit.layers.packed import Packing
from lorakit.layers.prefix import find_prefix
from lorakit.layers.segments import pack_rows
from lorakit.models.attention import GROUPED

# model_type of transformers; the first batch of a run is compared with the unpacked forward too.
_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "granite", "gemma"})
_KEYS = frozenset({"input_ids", "attention_mask", "labels"})


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch as one row.

    Attributes:
        inputs: what the model is called with.
        mask: (1, num_tokens) where an output is asked for.
        packing: how the rows lie in it.
    """

    inputs: dict[str, Any]
    mask: Tensor
    packing: Packing


def can_pack(model: PreTrainedModel) -> bool:
    """Whether this architecture takes packed batches under the attention `grouped`."""
    return model.config.model_type in _KNOWN


def takes_packed(model: PreTrainedModel) -> bool:
    """Whether batches of this model can be packed as it stands now."""
    config = model.config
    return (
        can_pack(model)
        and config._attn_implementation == GROUPED
        and find_prefix(model) is None
        and not (isinstance(active_adapter(model), tuple) and _replaces(model))
    )


def _replaces(model: PreTrainedModel) -> bool:
    """Whether an adapter trains a module as a whole: it does not know of packed rows."""
    record = find_attachments(model)
    return record is not None and any(plan.overrides for plan in record.plans.values())


def pack_batch(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    mask: Tensor,
    *,
    rows: Sequence[int] | None = None,
) -> PackedBatch | None:
    """The batch as one row, or None where it is not rows of tokens padded on the right.

    Args:
        model: takes packed batches.
        batch: input_ids, attention_mask and labels, (rows, positions).
        mask: (rows, positions) where an output is asked for.
        rows: which of the rows that name their adapters this batch is; None: all of them.
    """
    attention = batch.get("attention_mask")
    if attention is None or not batch.keys() <= _KEYS or attention.ndim != 2:
        return None
    counts = attention.sum(1)
    places = torch.arange(attention.shape[1], device=attention.device)
    on_the_right = ((places < counts[:, None]) == attention.bool()).all()
    lengths: list[int] = counts.tolist()
    if not bool(on_the_right) or min(lengths) < 1 or bool((mask & (attention == 0)).any()):
        return None
    active = active_adapter(model)
    owners = active if isinstance(active, tuple) else None
    if owners is not None and rows is not None:
        owners = tuple(owners[row] for row in rows)
    if owners is not None and len(owners) != len(lengths):
        return None
    asked = mask.long()
    first = torch.where(asked.any(1), asked.argmax(1), counts - 1)
    # A dropout draws for each row on its own.
    share = not (model.training and drops(model))
    packing, source = pack_rows(
        batch["input_ids"], lengths, first.tolist(), share=share, owners=owners
    )
    window = getattr(model.config, "sliding_window", None)
    if window is not None and packing.longest > window:
        return None
    inputs = {
        "input_ids": batch["input_ids"].flatten()[source][None],
        "position_ids": packing.positions[None],
        # Four dimensions: taken as it is, and not made into a mask over all pairs of tokens.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=source.device),
        "packing": packing,
    }
    return PackedBatch(inputs, mask.flatten()[source][None], packing)


def drops(model: PreTrainedModel) -> bool:
    """Whether anything in the model drops at random when it trains."""
    # Attention weights are dropped by a number in the configuration, the rest by modules.
    return getattr(model.config, "attention_dropout", 0.0) > 0 or any(
        (isinstance(m, nn.Dropout) and m.p > 0) or (isinstance(m, LowRank) and m.dropout > 0)
        for m in model.modules()
    )
