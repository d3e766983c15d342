"""Tiny random bases for classification, on disk with their tokenizers, and rows made for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

WORDS = [f"w{i}" for i in range(40)]
GOOD, BAD = WORDS[:6], WORDS[6:12]
ENCODERS = ("bert", "roberta", "deberta-v2")
DECODERS = ("llama", "gpt2", "qwen2")

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_VOCAB = {name: index for index, name in enumerate([*_SPECIAL, *WORDS])}
_SIZE = {"vocab_size": len(_VOCAB), "hidden_size": 32, "num_hidden_layers": 2}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 48}


def tokenizer(
    *, encoder: bool = True, pad: bool = True, limit: int = 48
) -> PreTrainedTokenizerFast:
    """Words to ids; an encoder's puts <s> in front and </s> behind each sentence."""
    raw = Tokenizer(models.WordLevel(_VOCAB, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad:
        names["pad_token"] = "<pad>"
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if encoder else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=limit, model_input_names=inputs, **names
    )


def _model(name: str) -> PreTrainedModel:
    if name == "bert":
        return BertModel(BertConfig(**_SIZE, **_HEADS, pad_token_id=0, max_position_embeddings=48))
    if name == "bert-masked":
        # As it is saved, it has no pooler, which a classifier reads.
        return BertForMaskedLM(
            BertConfig(**_SIZE, **_HEADS, pad_token_id=0, max_position_embeddings=48)
        )
    if name == "roberta":
        config = RobertaConfig(
            **_SIZE, **_HEADS, **_ENDS, max_position_embeddings=50, type_vocab_size=2
        )
        return RobertaModel(config, add_pooling_layer=False)
    if name == "deberta-v2":
        config = DebertaV2Config(
            **_SIZE,
            **_HEADS,
            pad_token_id=0,
            max_position_embeddings=48,
            pooler_hidden_size=32,
            type_vocab_size=2,
        )
        return DebertaV2Model(config)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**_SIZE, **_HEADS, **_ENDS, num_key_value_heads=2))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_SIZE, **_HEADS, **_ENDS, num_key_value_heads=2))
    config = GPT2Config(
        vocab_size=len(_VOCAB), n_embd=32, n_layer=2, n_head=4, n_positions=48, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def write_base(directory: Path, name: str = "bert", *, seed: int = 5) -> Path:
    """A random base without a classification head (GPT-2's tokenizer has no padding token)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _model(name).save_pretrained(directory)
    tokenizer(encoder=name not in DECODERS, pad=name != "gpt2").save_pretrained(directory)
    return directory


def rows(count: int, *, seed: int = 0, kind: str = "pair") -> list[dict[str, Any]]:
    """Rows that can be learned: the label says whether the first sentence holds a GOOD word.

    kind: "single" (sentence, label), "pair" (sentence1, sentence2, label), "score" (a pair and a
    number), "named" (single, label by name).
    """
    rng = random.Random(seed)
    made = []
    for i in range(count):
        good = i % 2
        words = rng.choices(WORDS[12:], k=rng.randint(2, 9))
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if good else BAD))
        other = " ".join(rng.choices(WORDS[12:], k=rng.randint(2, 9)))
        text = " ".join(words)
        made.append(
            {
                "single": {"sentence": text, "label": good},
                "named": {"text": text, "label": "good" if good else "bad"},
                "pair": {"sentence1": text, "sentence2": other, "label": good},
                "score": {
                    "sentence1": text,
                    "sentence2": other,
                    "score": 1.5 + 2 * good + rng.random() / 2,
                },
            }[kind]
        )
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
