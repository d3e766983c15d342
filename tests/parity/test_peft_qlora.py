"""PEFT's QLoRA on the very same 4-bit weights gives the same numbers and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import tiny_models
from learned import attach_learned, trainable
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_base_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_forward_and_gradients_are_peft_s(tmp_path: Path, architecture: str) -> None:
    tiny_models.build(architecture).save_pretrained(tmp_path / "base")
    ours = load_base_model(tmp_path / "base", "nf4", device="cpu")
    theirs = load_base_model(tmp_path / "base", "nf4", device="cpu")
    targets = "all-linear" if architecture == "llama" else ("c_attn", "c_fc")
    attach_learned(ours, LoraSpec(r=4, alpha=6.0, targets=targets))
    save_adapter(ours, tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    peft_model.eval()
    given = tiny_models.inputs(ours)
    mine, its = tiny_models.outputs(ours, given), tiny_models.outputs(peft_model, given)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    for model in (ours, peft_model):
        model(**given).logits.square().mean().backward()
    norms = [
        sorted(float(p.grad.norm()) for p in trainable(model).values() if p.grad is not None)
        for model in (ours, peft_model)
    ]
    assert len(norms[0]) == len(norms[1]) > 0
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=1e-3, atol=1e-7)
