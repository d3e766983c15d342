"""Start an adapter from data before training it: EVA and LoRA-GA.

Run: python examples/start_from_data.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def main() -> None:
    """The base answers as before; the factors know where the data has its directions."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    ids = torch.randint(3, 64, (4, 8, 12))
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    with torch.no_grad():
        base = model(input_ids=ids[0]).logits

    for init in ("eva", "lora_ga"):
        lk.attach(model, lk.LoraSpec(r=4, alpha=8, targets="all-linear", init=init), name=init)
        seen = lk.initialise_from_data(model, init, batches)
        with torch.no_grad():
            change = (model(input_ids=ids[0]).logits - base).abs().max()
        print(f"{init}: looked at {seen} batches; the output moved by {change:.1e}")
        assert seen == len(batches)
        assert change < 1e-4

    # From here it trains like any other adapter.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    first = last = float("nan")
    for step in range(10):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (loss.item(), loss.item()) if step == 0 else (first, loss.item())
    print(f"loss {first:.3f} -> {last:.3f}")
    assert last < first


if __name__ == "__main__":
    main()
