"""transformers' own generation over prompts of different lengths in one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)


def generate_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_new_tokens: int,
    follower: LogitsProcessor,
    ends: StoppingCriteria | None = None,
) -> None:
    """Run every prompt to its end; `follower` sees the logits and chooses the tokens.

    Args:
        model: its own settings for generation are aside.
        prompts: tokens of each row.
        pad_id: any token; it is masked.
        max_new_tokens: of the longest answer.
        follower: called with (rows, vocabulary) once per token; what it returns decides.
        ends: says per row whether it is finished.
    """
    ids, mask = _padded(model, prompts, pad_id)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
    )
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([follower]),
        stopping_criteria=StoppingCriteriaList([] if ends is None else [ends]),
    )


def _padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        # A decoder continues from the right edge; an encoder counts from the left one.
        left = 0 if model.config.is_encoder_decoder else width - len(prompt)
        ids[i, left : left + len(prompt)] = torch.tensor(prompt)
        mask[i, left : left + len(prompt)] = 1
    return ids.to(model.device), mask.to(model.device)
