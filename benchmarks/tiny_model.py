"""A model of few layers and random weights, for the `--tiny` runs of benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.models.load import load_tokenizer


def write_tiny(model: str, path: Path) -> Path:
    """A Llama of two layers with the tokenizer of the model that is named; its absolute path."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, num_hidden_layers=2)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path.resolve()
