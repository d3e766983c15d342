"""The memory of answering: weights, key/value cache, and the pass over the prompt."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lorakit.errors import ModelError
from lorakit.models.quantizable import estimate_nf4_bytes
from lorakit.planner.depth import Blocks, repeated_blocks, shortened
from lorakit.planner.fake import become_fake, keep_in
from lorakit.planner.ledger import Ledger
from lorakit.planner.memory import TrainingSetup
from lorakit.planner.step import head_of


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationEstimate:
    """Bytes while a model answers with its adapter merged, or beside an adapter of small size.

    Attributes:
        weights_bytes: the base.
        cache_bytes: keys and values of all positions of all rows.
        prompt_bytes: what the pass over the prompt holds beside, at its fullest moment.
    """

    weights_bytes: int
    cache_bytes: int
    prompt_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.cache_bytes + self.prompt_bytes

    def to_json(self) -> dict[str, int]:
        """Plain values, the total included."""
        return {
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
            "prompt_bytes": self.prompt_bytes,
            "total_bytes": self.total_bytes,
        }


def can_answer(model: PreTrainedModel) -> bool:
    """Whether the model writes text: a masked language model has a head as well, and does not."""
    return model.can_generate() and head_of(model) is not None


def estimate_generation(
    model: PreTrainedModel, *, rows: int, positions: int, setup: TrainingSetup
) -> GenerationEstimate:
    """Run the pass over a prompt on tensors without memory, and count; changes nothing.

    Args:
        model: the base on the meta device, with a head that predicts the next token.
        rows: answers at the same time.
        positions: prompt and answer together, taken as one prompt: the longest pass there can be.
        setup: how the numbers are held; checkpointing plays no part.

    Raises:
        ModelError: the model does not generate, or cannot be run without values.
    """
    if not can_answer(model):
        raise ModelError(
            "this model does not generate: it has no head that predicts the next token",
            where=type(model).__name__,
        )
    own = copy.deepcopy(model)
    keep_in(own, setup.dtype, four_bit=setup.four_bit)
    own.eval()
    blocks = repeated_blocks(own)
    few = 2 if blocks is None else max(2, blocks.period)
    try:
        if blocks is None or few + 2 * blocks.period >= blocks.count:
            cache, prompt = _run(own, rows, positions)
        else:
            cache, prompt = _line(own, blocks, few, (rows, positions))
    except Exception as error:
        raise ModelError(
            "the memory of generation cannot be counted for this model",
            where=type(model).__name__,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
        ) from error
    num_params = sum(p.numel() for p in model.parameters())
    weights_bytes = num_params * setup.dtype.itemsize
    if setup.four_bit:
        weights_bytes = estimate_nf4_bytes(model, setup.dtype)
    return GenerationEstimate(
        weights_bytes=weights_bytes, cache_bytes=round(cache), prompt_bytes=round(prompt)
    )


def _line(
    model: PreTrainedModel, blocks: Blocks, few: int, shape: tuple[int, int]
) -> tuple[float, float]:
    short = _run(shortened(model, blocks, few), *shape)
    longer = _run(shortened(model, blocks, few + blocks.period), *shape)
    times = (blocks.count - few) / blocks.period
    cache, prompt = (a + (b - a) * times for a, b in zip(short, longer, strict=True))
    return cache, prompt


def _run(model: PreTrainedModel, rows: int, positions: int) -> tuple[float, float]:
    """Bytes of the cache, and of what is beside it at the fullest moment."""
    mode = FakeTensorMode()
    become_fake(model, mode)
    shape = (rows, positions)
    with mode:
        inputs: dict[str, Any] = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    else:
        inputs["logits_to_keep"] = 1
    ledger = Ledger([*model.parameters(), *model.buffers(), *_tensors(inputs)])
    with mode, torch.no_grad(), ledger:
        ledger.enter("prompt", "prompt")
        found = model(**inputs, use_cache=True)
        logits_bytes = found.logits.untyped_storage().nbytes()
        cache = found.past_key_values
        del found
    cache_bytes = sum(ledger.alive.values())
    del cache
    peak_bytes = sum(ledger.peaks["prompt"].values())
    return cache_bytes, max(logits_bytes, peak_bytes - cache_bytes)


def _tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in inputs.values() if isinstance(value, torch.Tensor)]
