"""The tokens that all prompts of a batch begin with, read once when they are answered.

Prompts share a system message, and a few examples where they are shown. A causal model turns the
same start into the same keys and values in every row, so one row computes them for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel

from lorakit.adapters.attach import active_adapter
from lorakit.layers.prefix import find_prefix
from lorakit.models.packing import can_pack

# Fewer tokens do not pay for a pass of their own.
_LEAST_TOKENS = 8


def shared_start(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, if this model can read them once; otherwise 0.

    At least the last token of every prompt is not among them. Models are known to do so that number
    tokens by the attention mask and see each other in attention alone, without a window, with one
    adapter or none for all rows.

    Args:
        model: what will answer.
        prompts: token ids of each prompt, none empty.
    """
    window = getattr(model.config, "sliding_window", None)
    apart = isinstance(active_adapter(model), tuple) or find_prefix(model) is not None
    if len(prompts) < 2 or not can_pack(model) or window is not None or apart:
        return 0
    rows = [list(prompt) for prompt in prompts]
    first, last = min(rows), max(rows)
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )
    count = min(same, *(len(row) - 1 for row in rows))
    return count if count >= _LEAST_TOKENS else 0


def read_start(model: PreTrainedModel, start: Sequence[int], num_rows: int) -> DynamicCache:
    """The keys and values of a start of prompts, once for each row of a batch.

    Args:
        model: see `shared_start`.
        start: token ids.
        num_rows: rows of the batch.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(start)], device=model.device)
    # Without the head: nobody asks for the logits.
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(num_rows)
    return cache
