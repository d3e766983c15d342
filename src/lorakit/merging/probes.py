"""Ask a model a few fixed questions: logits, hidden states, greedy continuations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_TEXTS = (
    "The capital of France is",
    "SELECT name, COUNT(*) FROM orders WHERE year > 2019 GROUP BY",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Once upon a time, in a small village by the sea, there lived",
)
_NUM_RANDOM_TOKENS = 24
_NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said to the probes.

    Attributes:
        outputs: one float32 tensor per probe: logits (of a span: of its start and its end), or the
            last hidden state of a bare encoder.
        layers: one list of float32 hidden states per probe.
        continuations: greedily chosen token ids per probe; empty for models that do not generate.
    """

    outputs: list[Tensor]
    layers: list[list[Tensor]]
    continuations: list[list[int]]


def make_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> list[dict[str, Tensor]]:
    """Fixed inputs for this model: text where there is a tokenizer, else seeded noise.

    Args:
        model: decides what kind of input is made.
        tokenizer: or None.

    Returns:
        Keyword arguments of the forward pass, one dict per probe, batch size 1.
    """
    if model.main_input_name != "input_ids":
        return [{model.main_input_name: _noise_image(model, seed)} for seed in range(2)]
    if tokenizer is None:
        rows = [_noise_tokens(model, seed) for seed in range(4)]
    else:
        rows = [torch.tensor([tokenizer.encode(text)]) for text in _TEXTS]
    probes = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    if model.config.is_encoder_decoder:
        for probe in probes:
            probe["decoder_input_ids"] = probe["input_ids"]
    return probes


@torch.inference_mode()
def ask(
    model: PreTrainedModel, probes: list[dict[str, Tensor]], *, generate: bool = False
) -> Answers:
    """Run the probes; changes nothing.

    Args:
        model: in eval mode.
        probes: see `make_probes`.
        generate: continue the probes greedily too, where the model can.
    """
    outputs: list[Tensor] = []
    layers: list[list[Tensor]] = []
    continuations: list[list[int]] = []
    for probe in probes:
        inputs = {name: value.to(model.device) for name, value in probe.items()}
        result: Any = model(**inputs, output_hidden_states=True)
        outputs.append(_output(result).float().cpu())
        layers.append([h.float().cpu() for h in _hidden_states(result)])
        if generate and model.can_generate():
            continuations.append(_continue(model, inputs))
    return Answers(outputs, layers, continuations)


def max_abs_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference between two lists of equally shaped tensors."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _output(result: Any) -> Tensor:
    """The logits of whatever head there is, else the last hidden state."""
    if getattr(result, "start_logits", None) is not None:
        return torch.stack([result.start_logits, result.end_logits], dim=-1)
    names = ("logits", "prediction_logits", "last_hidden_state")
    return next(found for name in names if (found := getattr(result, name, None)) is not None)


def _hidden_states(result: Any) -> list[Tensor]:
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [h for name in names for h in (getattr(result, name, None) or ())]


def _continue(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[int]:
    ids = inputs["input_ids"]
    generate: Any = model.generate
    generated = generate(
        input_ids=ids,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        num_beams=1,
        pad_token_id=_pad_id(model),
    )
    start = 0 if model.config.is_encoder_decoder else ids.shape[1]
    return generated[0, start:].tolist()


def _pad_id(model: PreTrainedModel) -> int:
    config = model.generation_config
    for token in (config.pad_token_id, config.eos_token_id):
        if isinstance(token, list):
            return int(token[0])
        if token is not None:
            return int(token)
    return 0


def _noise_tokens(model: PreTrainedModel, seed: int) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, _NUM_RANDOM_TOKENS), generator=generator)


def _noise_image(model: PreTrainedModel, seed: int) -> Tensor:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    shape = (1, int(model.config.num_channels), int(height), int(width))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(model.dtype)
