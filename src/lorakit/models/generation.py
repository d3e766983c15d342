"""What every way of generating needs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lorakit.layers.prefix import num_special_positions
from lorakit.models.positions import num_positions


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model's positions have room for beside a prefix's, or None without an end."""
    longest = num_positions(model)
    return None if longest is None else longest - num_special_positions(model)


@contextmanager
def own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """The model's generation settings reduced to what its architecture needs, inside the block.

    transformers fills every setting that a caller leaves open from the model's own, so temperature
    or a repetition penalty would otherwise come back (the former with a warning).
    """
    own = model.generation_config
    plain = GenerationConfig(
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        # Part of how BART and mBART write at all: their first token is always the same.
        forced_bos_token_id=own.forced_bos_token_id,
    )
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Hand the output head a contiguous input inside the block.

    After the prompt, a model takes the last position of every row: a strided view, for which torch
    copies the whole head once per row of the batch.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
