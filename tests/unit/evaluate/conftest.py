from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [
    *["<pad>", "<s>", "</s>", "<unk>"],
    *[f"w{i}" for i in range(40)],
    *["good", "bad", "very"],
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that a test can write token ids as text."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture
def make_llama() -> Callable[..., PreTrainedModel]:
    def make(seed: int = 0, **extra: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        settings: dict[str, object] = {
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return LlamaForCausalLM(LlamaConfig(**{**settings, **extra})).eval()

    return make
