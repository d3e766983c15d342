"""Attach an adapter to a model and train it in a loop of your own.

Run: python examples/attach_and_train_loop.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def main() -> None:
    """Teach a tiny model one batch by heart, save the adapter, load it into a fresh model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        initializer_range=0.2,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    base = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(base)
    ids = torch.randint(3, 64, (4, 12))

    plan = lk.attach(model, lk.LoraSpec(r=8, alpha=32, targets="all-linear"), name="heart")
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == plan.num_params()
    print(f"{len(plan.sites)} sites, {plan.num_params():,} parameters to learn")

    optimizer = torch.optim.AdamW(learned, lr=2e-2)
    model.train()
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 0.5

    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = Path(directory) / "heart"
        lk.save_adapter(model, path, name="heart", passport={"seed": 0})
        lk.load_adapter(base, path, name="heart")
        assert torch.equal(base(input_ids=ids).logits, model(input_ids=ids).logits)
    print("saved, loaded into a fresh model: the same logits")


if __name__ == "__main__":
    main()
