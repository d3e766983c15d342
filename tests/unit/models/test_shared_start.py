"""Prompts that begin alike are answered as they are one by one."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import lorakit as lk
from lorakit.models.shared_start import read_start, shared_start

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "initializer_range": 0.4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "qwen3": Qwen3Config(**GQA),
    "gemma": GemmaConfig(**GQA),
    "gpt_neox": GPTNeoXConfig(**SMALL),
}


def model_of(config):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(start: int) -> list[list[int]]:
    rng = random.Random(1)
    shared = [rng.randrange(4, VOCAB) for _ in range(start)]
    # The second tokens behind the start differ, so that no more than the start is shared.
    return [[*shared, 5 + i, *(rng.randrange(4, VOCAB) for _ in range(3 * i))] for i in range(4)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_goes_on_as_each_row_alone(name: str) -> None:
    model = model_of(CONFIGS[name])
    lk.attach(model, lk.LoraSpec(r=3, alpha=9, targets="all-linear"), name="a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    asked = prompts(11)
    assert shared_start(model, asked) == 11
    width = max(len(prompt) for prompt in asked)
    rows = [[*p[:11], *[0] * (width - len(p)), *p[11:]] for p in asked]
    mask = [[1] * 11 + [0] * (width - len(p)) + [1] * (len(p) - 11) for p in asked]
    with torch.no_grad():
        together = model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            past_key_values=read_start(model, asked[0][:11], len(asked)),
            max_new_tokens=6,
            min_new_tokens=6,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        for row, prompt in enumerate(asked):
            ids = torch.tensor([[*prompt, *together.sequences[row, width:].tolist()]])
            alone = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(
                torch.stack([step[row] for step in together.logits]), alone, atol=1e-4, rtol=1e-4
            )


def test_the_cache_is_that_of_every_row() -> None:
    model = model_of(CONFIGS["llama"])
    start = [7, 9, 11, 4, 6]
    cache = read_start(model, start, 3)
    whole = model(input_ids=torch.tensor([start] * 3), use_cache=True).past_key_values
    for mine, own in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(mine.keys, own.keys)
        torch.testing.assert_close(mine.values, own.values)


def test_what_is_not_shared() -> None:
    model = model_of(CONFIGS["llama"])
    assert shared_start(model, prompts(5)) == 0  # too few
    assert shared_start(model, prompts(11)[:1]) == 0  # nothing to share with
    same = list(range(4, 20))
    assert shared_start(model, [same, same]) == 15  # the last token is asked for its answer
    assert shared_start(model, [same, [3, *same]]) == 0
    lk.attach(model, lk.LoraSpec(r=2), name="a")
    with lk.use(model, ["a", None]):
        assert shared_start(model, [same, same]) == 0
    window = model_of(MistralConfig(**GQA, sliding_window=4))
    assert shared_start(window, [same, same]) == 0
