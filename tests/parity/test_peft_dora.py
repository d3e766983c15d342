"""DoRA in PEFT and here: the same output and the same gradients, in train mode, with dropout."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny_models
from lorakit.adapters.attachments import adapted_layers
from lorakit.formats.peft import load_adapter, save_adapter

_TENSORS = "adapter_model.safetensors"
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dropout": ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.3}),
    "biased-dropout": ("bert", {"target_modules": ["query"], "lora_dropout": 0.3}),
    "bias-trained": (
        "bert",
        {"target_modules": ["query", "attention.output.dense"], "bias": "lora_only"},
    ),
    "conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_dropout": 0.2},
    ),
    "embedding": ("bert", {"target_modules": ["word_embeddings", "value"]}),
    "embedding-scaled": ("gemma3_text", {"target_modules": ["embed_tokens"]}),
    "conv2d": ("vit", {"target_modules": ["projection", "v_proj"], "lora_dropout": 0.3}),
    "patterns-rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"v_proj": 2.0},
        },
    ),
}


def _theirs(base: nn.Module, settings: dict[str, Any], path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=7, use_dora=True, **settings)
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(str(path))
    return model


def _run(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    result = model(**given)
    y = result.logits if "logits" in result else result.last_hidden_state
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    (y * weights).sum().backward()
    return y.detach()


@pytest.mark.parametrize("key", list(_CASES))
def test_outputs_and_gradients_are_those_of_peft(key: str, tmp_path: Path) -> None:
    architecture, settings = _CASES[key]
    model, base = tiny_models.build(architecture), tiny_models.build(architecture)
    for each in (model, base):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    given = tiny_models.inputs(model)
    theirs = _theirs(base, settings, tmp_path / "theirs")
    with warnings.catch_warnings():
        # A tied embedding is said to be tied.
        warnings.simplefilter("ignore")
        load_adapter(model, tmp_path / "theirs")
    live = _run(model.train(), given)
    expected = _run(theirs.train(), given)
    torch.testing.assert_close(live, expected, rtol=1e-5, atol=1e-5)
    gradients = {
        n: p.grad for n, p in theirs.named_parameters() if p.grad is not None and "lora_" in n
    }
    checked = 0
    for layer in adapted_layers(model):
        branch = layer.branch_of("default")
        assert branch is not None
        (update,) = branch.updates()
        prefix = f"base_model.model.{layer.name}."
        for letter, mine in (("A", update.lora_A), ("B", update.lora_B)):
            names = (f"lora_{letter}.default.weight", f"lora_embedding_{letter}.default")
            (reference,) = [gradients[prefix + n] for n in names if prefix + n in gradients]
            torch.testing.assert_close(mine.grad, reference, rtol=1e-3, atol=1e-4)
            checked += 1
        reference = gradients[f"{prefix}lora_magnitude_vector.default.weight"]
        assert update.magnitude is not None
        torch.testing.assert_close(update.magnitude.grad, reference.flatten(), rtol=1e-3, atol=1e-4)
        checked += 1
    assert checked == len(gradients) > 0
    # The file comes back as it was, tensor for tensor.
    save_adapter(model, tmp_path / "ours")
    ours, written = (load_file(tmp_path / n / _TENSORS) for n in ("ours", "theirs"))
    copies = {k for k in written if k.endswith(".base_layer.weight")}
    assert set(ours) == set(written) - copies
    assert [k for k in ours if not ours[k].equal(written[k])] == []
    assert any("lora_magnitude_vector" in k for k in ours)
