"""Greedy answers to many prompts, in batches of similar length."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.endings import end_of_sequence_ids
from lorakit.errors import DataError, LorakitWarning, ModelError
from lorakit.models.generation import context_length, contiguous_head, own_settings_aside
from lorakit.models.label_head import evaluating
from lorakit.models.shared_start import read_start, shared_start
from lorakit.models.vocabulary import require_embeddings
from lorakit.progress import progress


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt.

    Attributes:
        text: without special tokens, and without whitespace at its ends.
        num_tokens: tokens generated, the end-of-sequence token included.
        finished: the model ended it itself; False if it was cut at the limit.
    """

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class _Job:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    pad_id: int
    context: int | None


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    label: str = "answering",
) -> list[Answer]:
    """Continue each prompt with the most likely token at every step, until it ends or the limit.

    An answer ends at any end-of-sequence token that the model or its tokenizer names, and at the
    marker with which the chat template closes an answer. The model's own sampling settings,
    penalties and suppressed tokens are not used, so the answers depend on the weights alone.
    Prompts of similar length share a batch. The adapter that is active (see
    `lorakit.adapters.attach.use`) answers; the model comes back in the mode it was in.

    Args:
        model: a causal or sequence-to-sequence language model.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts answered together.
        label: what the progress bar says.

    Returns:
        One answer per prompt, in the order of the prompts.

    Raises:
        DataError: a prompt is empty, leaves no room in the model's context, or has a token that the
            model does not know.
        ModelError: the model has no language-modelling head.
    """
    job = _prepare(model, tokenizer)
    check_prompts(model, prompts)
    require_embeddings(model, tokenizer, map(max, prompts))
    _warn_of_cuts(prompts, job.context, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers: dict[int, Answer] = {}
    num_tokens, started = 0, time.monotonic()
    if not prompts:
        return []
    with (
        progress(label, len(prompts)) as bar,
        evaluating(model),
        own_settings_aside(model),
        contiguous_head(model),
        torch.inference_mode(),
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = _answer_batch(job, [prompts[i] for i in chosen], max_new_tokens)
            answers.update(zip(chosen, found, strict=True))
            num_tokens += sum(answer.num_tokens for answer in found)
            rate = num_tokens / max(time.monotonic() - started, 1e-9)
            bar.advance(len(chosen), note=f"{rate:.0f} tokens/s")
    return [answers[i] for i in range(len(prompts))]


def check_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    origins: Sequence[str] | None = None,
) -> None:
    """Refuse prompts that are empty or leave no room for an answer, before any work is done.

    Args:
        model: the model that is to answer.
        prompts: token ids of each prompt.
        origins: where each prompt comes from, for the message.

    Raises:
        DataError: names the first such prompt.
    """
    context = context_length(model)
    for index, prompt in enumerate(prompts):
        where = origins[index] if origins is not None else f"prompt {index}"
        if not len(prompt):
            raise DataError(
                "a prompt has no tokens",
                where=where,
                expected="at least one token to continue from",
                remedy="check the row's prompt and the columns that were named",
            )
        if context is not None and len(prompt) >= context:
            raise DataError(
                "a prompt does not fit into the model's context",
                where=where,
                expected=f"at most {context - 1:,} tokens, so that one is left for the answer",
                found=f"{len(prompt):,} tokens",
                remedy="shorten the prompt, or take a model with a longer context",
            )


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Job:
    if not model.can_generate():
        raise ModelError(
            "this model cannot write answers",
            where=type(model).__name__,
            expected="a causal or sequence-to-sequence language model",
        )
    eos_ids = end_of_sequence_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        # Padding is masked, so any id will do; the end of the answer is found from eos_ids.
        pad_id = eos_ids[0] if eos_ids else 0
    context = None if model.config.is_encoder_decoder else context_length(model)
    return _Job(model, tokenizer, eos_ids, pad_id, context)


def _warn_of_cuts(
    prompts: Sequence[Sequence[int]], context: int | None, max_new_tokens: int
) -> None:
    num_short = sum(context is not None and len(p) + max_new_tokens > context for p in prompts)
    if num_short:
        warnings.warn(
            f"{num_short} of {len(prompts)} prompts leave less than {max_new_tokens} tokens of the "
            f"model's context ({context}): these answers are cut where it ends",
            LorakitWarning,
            stacklevel=3,
        )


def _answer_batch(job: _Job, prompts: list[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    width = max(len(prompt) for prompt in prompts)
    device = job.model.device
    input_ids = torch.full((len(prompts), width), job.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    seq2seq = job.model.config.is_encoder_decoder
    shared = shared_start(job.model, prompts)
    for row, prompt in enumerate(prompts):
        # A decoder continues from the right edge; an encoder counts positions from the left one.
        # Where a start is shared it stands at the left edge, and padding behind it.
        gap = 0 if seq2seq else width - len(prompt)
        for part, left in ((prompt[:shared], 0), (prompt[shared:], shared + gap)):
            input_ids[row, left : left + len(part)] = torch.tensor(part, dtype=torch.long)
            attention_mask[row, left : left + len(part)] = 1
    room = max_new_tokens if job.context is None else min(max_new_tokens, job.context - width)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=room,
        pad_token_id=job.pad_id,
        eos_token_id=list(job.eos_ids) or None,
    )
    output = job.model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        past_key_values=read_start(job.model, prompts[0][:shared], len(prompts))
        if shared
        else None,
    )
    assert isinstance(output, Tensor)
    skipped = 1 if seq2seq else width
    return [_to_answer(job, row) for row in output[:, skipped:].tolist()]


def _to_answer(job: _Job, ids: list[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in job.eos_ids), None)
    kept = ids if end is None else ids[: end + 1]
    text = job.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Answer(text.strip(), len(kept), finished=end is not None)
