"""Adapt q and v of GPT-2's fused c_attn, each with an update of its own.

Run: python examples/fused_projection_parts.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lorakit as lk


def main() -> None:
    """Part by part in the model; one stacked update per module in the file."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    spec = lk.LoraSpec(r=4, alpha=12, targets=("c_attn.q", "c_attn.v"))
    plan = lk.attach(model, spec, name="parts")
    for site in plan.sites:
        print(f"{site.name}: part {site.part}, {site.shape[0]} x {site.shape[1]}, r={site.r}")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "parts"
        adapter = lk.save_adapter(model, path, name="parts")
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        print(f"in the file: r={config['r']}, alpha={config['lora_alpha']} on the whole c_attn")
        assert (config["r"], config["lora_alpha"]) == (8, 24)
        # The stacked update is the sum of the parts, and leaves k alone. Conv1D stores (in, out).
        delta = adapter.delta("transformer.h.0.attn.c_attn")
        assert delta.shape == (32, 96)
        assert bool((delta[:, 32:64] == 0).all())
        assert bool((delta[:, :32] != 0).any())
        assert bool((delta[:, 64:] != 0).any())
        # The passport remembers the parts: they come back as they were.
        assert list(lk.Adapter.load(path).factors) == [site.name for site in plan.sites]
    print("k is untouched; the parts come back from the file")


if __name__ == "__main__":
    main()
