"""Hashes of a tokenizer and of its chat template, for the passport and the run record."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the token ids mean: the vocabulary with its ids, and the special tokens.

    Padding, truncation and the chat template do not enter; neither does the file format.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return _sha256(json.dumps([vocabulary, special, ends], ensure_ascii=True))


def template_hash(tokenizer: PreTrainedTokenizerBase, own: str | None = None) -> str | None:
    """SHA-256 of the chat template, or None when there is none.

    Args:
        tokenizer: has one, perhaps.
        own: one that takes its place.
    """
    template = own or tokenizer.chat_template
    if not template:
        return None
    return _sha256(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
