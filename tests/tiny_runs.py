"""A tiny random Llama with a tokenizer and rows on disk, and configs of runs that take a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.train.config import TrainConfig

WORDS = [f"w{i}" for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_model(directory: Path, *, seed: int = 11) -> Path:
    """A random Llama (vocabulary 70, hidden 32, 2 layers) and its tokenizer."""
    names = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<user>",
        "<assistant>",
        "<end>",
        *WORDS,
        "a",
        "b",
        "c",
    ]
    vocab = {name: index for index, name in enumerate(names)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """Prompt and completion rows of very different lengths; the completion can be learned."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 14))
        answer = [words[0], *words[-1 : -rng.randint(2, 4) : -1]]
        rows.append({"prompt": " ".join(words), "completion": " " + " ".join(answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(directory: Path, output: str = "run", **train: Any) -> dict[str, Any]:
    """Plain values of a config: 22 rows, batch 3, accumulation 2, so 4 steps per epoch."""
    return {
        "model": str(directory / "model"),
        "data": {
            "train": str(directory / "train.jsonl"),
            "validation": str(directory / "validation.jsonl"),
        },
        "lora": {"r": 4, "alpha": 12, "targets": "all-linear", "dropout": 0.1},
        "train": {
            "epochs": 3,
            "batch_size": 3,
            "gradient_accumulation": 2,
            "lr": 0.01,
            "warmup_steps": 2,
            "precision": "fp32",
            "eval_every": 3,
            "save_every": 2,
            **train,
        },
        "output": str(directory / output),
    }


def config(directory: Path, output: str = "run", **train: Any) -> TrainConfig:
    """The same as a TrainConfig."""
    return TrainConfig.from_dict(values(directory, output, **train))


def write_all(directory: Path) -> Path:
    """Model, training rows and validation rows."""
    write_model(directory / "model")
    write_rows(directory / "train.jsonl", 22)
    write_rows(directory / "validation.jsonl", 7, seed=1)
    return directory
