"""Models that are only shapes: what well-known ones look like, by name, without a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lorakit.errors import ModelError, nearest
from lorakit.models.load import Ref, load_config

_Shape = Mapping[str, Any]


def _decoder(
    model_type: str,
    hidden: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    **more: Any,
) -> _Shape:
    """A decoder of Llama's family; heads of the queries and of the keys."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


def _gpt(width: int, layers: int, heads: int, positions: int = 1024) -> _Shape:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
    }


_TIED = {"tie_word_embeddings": True}
_GEMMA = {"head_dim": 256, **_TIED}
_QWEN3 = {"head_dim": 128}

# Each from the configuration its makers published; GPT-3 from the paper's table 2.1 (2005.14165).
SHAPES: Mapping[str, _Shape] = {
    "gpt2": _gpt(768, 12, 12),
    "gpt2-medium": _gpt(1024, 24, 16),
    "gpt2-large": _gpt(1280, 36, 20),
    "gpt2-xl": _gpt(1600, 48, 25),
    "gpt3-175b": _gpt(12288, 96, 96, 2048),
    "smollm2-135m": _decoder("llama", 576, 1536, 30, (9, 3), 49152, **_TIED),
    "smollm2-360m": _decoder("llama", 960, 2560, 32, (15, 5), 49152, **_TIED),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, (32, 32), 49152, **_TIED),
    "llama-2-7b": _decoder("llama", 4096, 11008, 32, (32, 32), 32000),
    "llama-2-13b": _decoder("llama", 5120, 13824, 40, (40, 40), 32000),
    "llama-2-70b": _decoder("llama", 8192, 28672, 80, (64, 8), 32000),
    "llama-3.2-1b": _decoder("llama", 2048, 8192, 16, (32, 8), 128256, head_dim=64, **_TIED),
    "llama-3.2-3b": _decoder("llama", 3072, 8192, 28, (24, 8), 128256, head_dim=128, **_TIED),
    "llama-3-8b": _decoder("llama", 4096, 14336, 32, (32, 8), 128256),
    "llama-3-70b": _decoder("llama", 8192, 28672, 80, (64, 8), 128256),
    "llama-3.1-405b": _decoder("llama", 16384, 53248, 126, (128, 8), 128256),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, (32, 8), 32000),
    "qwen2.5-7b": _decoder("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, (16, 8), 151936, **_QWEN3, **_TIED),
    "qwen3-4b": _decoder("qwen3", 2560, 9728, 36, (32, 8), 151936, **_QWEN3, **_TIED),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, (32, 8), 151936, **_QWEN3),
    "qwen3-14b": _decoder("qwen3", 5120, 17408, 40, (40, 8), 151936, **_QWEN3),
    "qwen3-32b": _decoder("qwen3", 5120, 25600, 64, (64, 8), 151936, **_QWEN3),
    "gemma-3-1b": _decoder("gemma3_text", 1152, 6912, 26, (4, 1), 262144, **_GEMMA),
    "gemma-3-4b": _decoder("gemma3_text", 2560, 10240, 34, (8, 4), 262208, **_GEMMA),
    "gemma-3-12b": _decoder("gemma3_text", 3840, 15360, 48, (16, 8), 262208, **_GEMMA),
    "gemma-3-27b": _decoder(
        "gemma3_text", 5376, 21504, 62, (32, 16), 262208, **_GEMMA | {"head_dim": 128}
    ),
    "phi-4": _decoder("phi3", 5120, 17920, 40, (40, 10), 100352, pad_token_id=0),
}


def planned_config(ref: Ref) -> PretrainedConfig:
    """The configuration of a named shape, a directory, a .gguf file, a named model or a hub id.

    From a hub only config.json is downloaded.

    Raises:
        ModelError: the model cannot be found, or its configuration is not one transformers knows.
    """
    name = os.fspath(ref)
    if name not in SHAPES or Path(name).exists():
        return _from_files(ref, name)
    values = dict(SHAPES[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.name_or_path = name
    return config


def _from_files(ref: Ref, name: str) -> PretrainedConfig:
    try:
        return load_config(ref)
    except ModelError as error:
        close = nearest(name.lower(), SHAPES)
        if not close or "cannot be found" not in error.what:
            raise
        raise ModelError(
            error.what,
            where=error.where,
            expected=f"{error.expected}, or a shape by name",
            found=error.found,
            remedy=f"the nearest shapes are {', '.join(close)}; {error.remedy}",
        ) from error
