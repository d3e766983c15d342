"""Count what an adapter for an 8-billion-parameter model would hold, without its weights.

Run: python examples/plan_on_meta.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def main() -> None:
    """Plan three requests for a model of Llama-3-8B's shape on the meta device."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    num_base = sum(parameter.numel() for parameter in model.parameters())
    print(f"base: {num_base:,} parameters")

    requests = {
        "query and value, r=8": lk.LoraSpec(r=8, targets="qv"),
        "all linear layers, r=16": lk.LoraSpec(r=16, targets="all-linear"),
        "the same, down_proj at r=64": lk.LoraSpec(
            r=16, targets="all-linear", rank_pattern={"down_proj": 64}
        ),
    }
    for label, spec in requests.items():
        plan = lk.plan_adapter(model, spec)
        count = plan.num_params()
        print(f"{label}: {len(plan.sites)} sites, {count:,} ({count / num_base:.3%})")
    # q is 4096 -> 4096, v is 4096 -> 1024: r (in + out) each, in 32 layers.
    expected = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert lk.plan_adapter(model, requests["query and value, r=8"]).num_params() == expected

    try:
        lk.plan_adapter(model, lk.LoraSpec(targets=("q_proj", "v_porj")))
    except lk.LorakitError as error:
        print(error)


if __name__ == "__main__":
    main()
