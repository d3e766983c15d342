"""Adapters of PEFT for heads of other tasks, merged into a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering

import tiny_models
from learned import shake
from lorakit.merging.run import MergeRequest, merge_to_disk


def spans() -> BertForQuestionAnswering:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForQuestionAnswering(BertConfig(vocab_size=128, intermediate_size=48, **sizes))


def test_a_head_of_spans_is_merged_and_proved(tmp_path: Path) -> None:
    model = tiny_models.seeded(spans).eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["query"], task_type="QUESTION_ANS")
    theirs = get_peft_model(model, config)
    shake(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    certificate = merge_to_disk(
        MergeRequest(
            adapter=tmp_path / "a", base=str(tmp_path / "base"), output=tmp_path / "merged"
        )
    )
    assert certificate["max_abs_logit_change"] > 0.01
    merged = BertForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        found, wanted = merged(input_ids=ids), theirs.eval()(input_ids=ids)
    torch.testing.assert_close(found.start_logits, wanted.start_logits)
    torch.testing.assert_close(found.end_logits, wanted.end_logits)
