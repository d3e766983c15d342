"""Loading is strict: another base, a missing tensor, a key that would change the result.

Run: python examples/strict_loading.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk


def tiny_model(seed: int) -> LlamaForCausalLM:
    """A random base; another seed is another base."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()


def refused(model: LlamaForCausalLM, path: Path) -> str:
    """The error that loading gives; nothing is attached then."""
    try:
        lk.load_adapter(model, path, name="task")
    except lk.LorakitError as error:
        assert lk.active_adapter(model) is None
        return f"{type(error).__name__}: {error}\n"
    raise AssertionError("this should have been refused")


def main() -> None:
    """Three ways to be wrong."""
    model = tiny_model(0)
    lk.attach(model, lk.LoraSpec(r=4, targets="qv"), name="task")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "task"
        lk.save_adapter(model, path, name="task")
        print(refused(tiny_model(1), path))

        tensors = load_file(path / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, path / "adapter_model.safetensors")
        print(refused(tiny_model(0), path))

        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        (path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
        print(refused(tiny_model(0), path))


if __name__ == "__main__":
    main()
