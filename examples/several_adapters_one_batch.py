"""Several adapters on one model, and one adapter per row of a batch.

Run: python examples/several_adapters_one_batch.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=None,
)


def attach_random(model: LlamaForCausalLM, name: str, spec: lk.LoraSpec) -> None:
    """Attach an adapter and fill its B, which starts at zero, as if it had been trained."""
    lk.attach(model, spec, name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # attach leaves only the new adapter trainable
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def main() -> None:
    """Row i of a mixed batch equals a run of its adapter alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    attach_random(model, "sql", lk.LoraSpec(r=4, targets="qv"))
    attach_random(model, "chat", lk.LoraSpec(r=2, alpha=8, targets="all-linear"))
    print("after attach the newest is active:", lk.active_adapter(model))

    ids = torch.randint(1, 64, (3, 10))
    rows = ["sql", None, "chat"]  # None: the base alone
    with torch.no_grad():
        with lk.use(model, rows):
            mixed = model(input_ids=ids).logits
            continued = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        for index, name in enumerate(rows):
            with lk.use(model, name):
                alone = model(input_ids=ids[index : index + 1]).logits[0]
            torch.testing.assert_close(mixed[index], alone, rtol=1e-4, atol=1e-5)
            print(f"row {index} ({name or 'base'}): as alone; goes on {continued[index, 10:]}")
    assert lk.active_adapter(model) == "chat"  # what was active before `use` is back

    lk.detach(model)
    assert lk.active_adapter(model) is None
    print("detached: the original modules are back")


if __name__ == "__main__":
    main()
