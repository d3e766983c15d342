"""Adapters of PEFT whose layers this model's class has under other modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import tiny_models
from learned import shake
from lorakit.adapters.bind import plan_binding
from lorakit.analysis.updates import Base, read_source
from lorakit.errors import AdapterFileError, LorakitWarning
from lorakit.formats.peft import load_adapter, read_adapter, save_adapter
from lorakit.serve.served import served_form

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOVED = "taken for the same"


def gemma() -> PreTrainedModel:
    """A text part and a vision part, both with numbered layers that have a q_proj."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    text = Gemma3TextConfig(
        **sizes,
        tie_word_embeddings=False,
        vocab_size=128,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    vision = SiglipVisionConfig(
        **sizes, intermediate_size=48, image_size=16, patch_size=8, num_channels=3
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)


def written(built: Callable[[], nn.Module], path: Path, **given: object) -> nn.Module:
    """What PEFT saves of a learned adapter; returns its model."""
    config = LoraConfig(r=3, lora_alpha=7, rank_pattern={"v_proj": 5}, **given)
    model = get_peft_model(built(), config)
    shake(model)
    model.save_pretrained(str(path))
    return model.eval()


def rename(path: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): value for name, value in load_file(path / TENSORS).items()}
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    config = json.loads((path / CONFIG).read_text())
    config["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    (path / CONFIG).write_text(json.dumps(config))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13).reshape(2, 5)).logits


def before_452(name: str) -> str:
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    return name.replace("model.lm_head", "model.language_model.lm_head")


def text_alone(name: str) -> str:
    return name.replace("model.model.language_model.", "model.model.")


TEXT = r".*language_model.*\.(q_proj|v_proj|down_proj)"


@pytest.mark.parametrize("change", [before_452, text_alone])
def test_gemma_3_under_its_other_names(change: Callable[[str], str], tmp_path: Path) -> None:
    def built() -> PreTrainedModel:
        return tiny_models.seeded(gemma).eval()

    wanted = logits(
        written(built, tmp_path / "a", target_modules=TEXT, modules_to_save=["lm_head"])
    )
    rename(tmp_path / "a", change)
    model = built()
    with pytest.warns(LorakitWarning, match=MOVED):
        load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), wanted)
    save_adapter(model, tmp_path / "again")
    again = built()
    load_adapter(again, tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted)
    with pytest.warns(LorakitWarning, match=MOVED):
        bound = plan_binding(built(), read_adapter(tmp_path / "a"))
    assert all(name.startswith("model.language_model.layers.") for name in bound.factors)
    with pytest.warns(LorakitWarning, match=MOVED):
        seen = read_source(tmp_path / "a", base=Base(built()))
    assert seen.updates.keys() == bound.factors.keys()


def test_a_body_without_a_head_and_the_same_with_one(tmp_path: Path) -> None:
    def causal() -> PreTrainedModel:
        return tiny_models.build("llama").eval()

    body = written(lambda: causal().model, tmp_path / "body", target_modules=["q_proj", "v_proj"])
    model = causal()
    with torch.no_grad():
        wanted = model.lm_head(body(input_ids=torch.arange(3, 13).reshape(2, 5))[0])
    with pytest.warns(LorakitWarning, match=MOVED):
        load_adapter(model, tmp_path / "body")
    torch.testing.assert_close(logits(model), wanted)
    with pytest.warns(LorakitWarning, match=MOVED):
        served = served_form(causal(), read_adapter(tmp_path / "body"), "key")
    assert "model.layers.0.self_attn.q_proj" in served.sites
    whole = written(causal, tmp_path / "whole", target_modules=["q_proj", "v_proj"])
    alone = causal().model
    with pytest.warns(LorakitWarning, match=MOVED):
        load_adapter(alone, tmp_path / "whole")
    torch.testing.assert_close(alone.eval()(**_ids())[0], whole.get_base_model().model(**_ids())[0])


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 13).reshape(2, 5)}


def test_other_layers_are_not_taken_for_these(tmp_path: Path) -> None:
    written(lambda: tiny_models.build("llama"), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    rename(tmp_path / "a", lambda name: name.replace("layers.1.", "layers.7."))
    with pytest.raises(AdapterFileError, match=r"layers\.7"):
        load_adapter(tiny_models.build("llama"), tmp_path / "a")
    written(lambda: tiny_models.build("llama"), tmp_path / "b", target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterFileError, match="nothing of this adapter binds"):
        load_adapter(tiny_models.build("gpt2"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["r"] == 3


def test_a_tensor_that_is_missing_is_missed_under_the_other_name(tmp_path: Path) -> None:
    def built() -> PreTrainedModel:
        return tiny_models.seeded(gemma).eval()

    written(built, tmp_path / "a", target_modules=TEXT)
    rename(tmp_path / "a", text_alone)
    tensors = load_file(tmp_path / "a" / TENSORS)
    kept = {name: value for name, value in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, tmp_path / "a" / TENSORS)
    with (
        pytest.warns(LorakitWarning, match=MOVED),
        pytest.raises(AdapterFileError, match=r"language_model\.layers\.1\.mlp\.down_proj"),
    ):
        load_adapter(built(), tmp_path / "a")
