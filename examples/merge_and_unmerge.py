"""Fold an adapter into the weights, and take it out again bit for bit.

Run: python examples/merge_and_unmerge.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def main() -> None:
    """The merged model answers as the live adapter did; unmerge restores every bit."""
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
    ids = torch.randint(3, 64, (2, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    lk.attach(model, lk.LoraSpec(r=4, alpha=16, targets="all-linear"), name="task")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B starts at zero; pretend it was trained
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        live = model(input_ids=ids).logits

        done = lk.merge(model, "task")
        merged = model(input_ids=ids).logits
        error = float((merged - live).abs().max())
        print(f"merged {done.num_weights} weights; live and merged differ by at most {error:.2g}")
        print(f"unmerge will need the originals: {done.kept_bytes:,} bytes are kept")
        assert error < 1e-4

        try:
            with lk.use(model, None):
                pass
        except lk.LorakitError as refused:  # a merged adapter runs for every row
            print(refused)

        lk.unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, live)
    lk.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    print("unmerged and detached: every bit of the base is back")


if __name__ == "__main__":
    main()
