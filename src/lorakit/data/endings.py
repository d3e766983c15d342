"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.sft import stop_token_ids


def end_of_sequence_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Every token id that ends an answer: EOS as model and tokenizer name it, the chat marker.

    The chat marker is what the template writes behind an answer, which need not be EOS.
    """
    sources: tuple[Any, ...] = (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    )
    named = set(stop_token_ids(tokenizer))
    for ids in sources:
        named.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(named))
