"""Files made by the tools themselves: loralib, mlx-lm, PEFT's expert layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import tiny_models
from learned import attach_learned
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.peft import load_adapter

loralib = pytest.importorskip("loralib")


def merged_gpt2(enabled: list[bool], *, r: int = 3, alpha: int = 12) -> GPT2LMHeadModel:
    """The tiny GPT-2 as microsoft/LoRA's example adapts it."""
    model: Any = tiny_models.build("gpt2")
    for block in model.transformer.h:
        old = block.attn.c_attn
        new = loralib.MergedLinear(
            32,
            96,
            r=r,
            lora_alpha=alpha,
            enable_lora=enabled,
            fan_in_fan_out=True,
            merge_weights=False,
        )
        new.weight.data, new.bias.data = old.weight.data.clone(), old.bias.data.clone()
        block.attn.c_attn = new
    return model.eval()


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("enabled", ["q,v", "k", "q,k,v"])
def test_a_merged_projection_of_loralib(enabled: str, tmp_path: Path) -> None:
    parts = tuple(enabled.split(","))
    theirs = merged_gpt2([part in parts for part in "qkv"])
    shake(theirs)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    tiny_models.build("gpt2").save_pretrained(tmp_path / "base")
    options = ConvertOptions(alpha=12, parts=parts)
    convert(
        tmp_path / "lora.pt",
        tmp_path / "made",
        "peft",
        base=str(tmp_path / "base"),
        options=options,
    )
    ours = tiny_models.build("gpt2")
    load_adapter(ours, tmp_path / "made")
    given = tiny_models.inputs(ours)
    wanted = tiny_models.outputs(theirs, given)
    torch.testing.assert_close(tiny_models.outputs(ours, given), wanted, rtol=1e-4, atol=1e-5)
    # And back: loralib loads what we write.
    convert(tmp_path / "made", tmp_path / "back", "loralib", base=str(tmp_path / "base"))
    again = merged_gpt2([part in parts for part in "qkv"])
    state = torch.load(tmp_path / "back" / "lora.pt", weights_only=True)
    assert not again.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(tiny_models.outputs(again, given), wanted, rtol=1e-4, atol=1e-5)


def test_a_whole_checkpoint_of_loralib(tmp_path: Path) -> None:
    """RoBERTa with lora.Linear on query and value, saved whole, wrapped as its scripts do."""
    theirs: Any = tiny_models.build("roberta")
    for layer in theirs.encoder.layer:
        for leaf in ("query", "value"):
            old = getattr(layer.attention.self, leaf)
            new = loralib.Linear(32, 32, r=4, lora_alpha=10)
            new.weight.data, new.bias.data = old.weight.data.clone(), old.bias.data.clone()
            setattr(layer.attention.self, leaf, new)
    theirs.train()
    shake(theirs)
    theirs.eval()
    # In eval mode loralib has merged the update into the weights that it saves.
    state = {f"roberta.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "model.bin")
    tiny_models.build("roberta").save_pretrained(tmp_path / "base")
    with pytest.warns(LorakitWarning, match="may have the update merged in"):
        convert(
            tmp_path / "model.bin",
            tmp_path / "made",
            "peft",
            base=str(tmp_path / "base"),
            options=ConvertOptions(alpha=10),
        )
    ours = tiny_models.build("roberta")
    load_adapter(ours, tmp_path / "made")
    given = tiny_models.inputs(ours)
    torch.testing.assert_close(
        tiny_models.outputs(ours, given), tiny_models.outputs(theirs, given), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("update", ["lora", "dora"])
def test_mlx_lm_answers_as_we_do(update: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    llama = pytest.importorskip("mlx_lm.models.llama")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    spec: dict[str, Any] = {
        "targets": ("q_proj", "v_proj", "down_proj"),
        "r": 3,
        "alpha": 7.5,
        "rank_pattern": {"down_proj": 5},
        "update": update,
    }
    attach_learned(model, LoraSpec(**spec))
    adapter_from_model(model).save(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "mlx", "mlx", base=str(tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    theirs = llama.Model(llama.ModelArgs.from_dict(config))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    theirs.load_weights([(k, mx.array(v.numpy())) for k, v in weights.items()])
    theirs = tuner.load_adapters(theirs, str(tmp_path / "mlx"))
    theirs.eval()
    given = tiny_models.inputs(model)
    found = torch.tensor(theirs(mx.array(given["input_ids"].numpy())).tolist())
    torch.testing.assert_close(found, tiny_models.outputs(model, given), rtol=1e-3, atol=1e-4)


# What mlx-lm's models read from a configuration and transformers 5 no longer writes.
_MLX_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
}


@pytest.mark.parametrize("name", _MLX_CONFIGS)
def test_mlx_lm_has_other_names_for_some_models(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_utils = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    # mlx-lm's GPT-NeoX has an MLP of four times the width, whatever the configuration says.
    config: Any = tiny_models.build(name).config
    if name == "gpt_neox":
        config.intermediate_size = 128
    model = tiny_models.seeded(lambda: AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "base")
    ends = ("embed_in", "lm_head") if name == "gpt_neox" else ()
    inside = ("query_key_value", "c_attn", "dense", "c_proj", "dense_h_to_4h")
    targets = ends + tuple(
        t for t in inside if any(n.endswith(t) for n, _ in model.named_modules())
    )
    attach_learned(model, LoraSpec(targets=targets, r=3, alpha=7.5))
    adapter_from_model(model).save(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "mlx", "mlx", base=str(tmp_path / "base"))
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **_MLX_CONFIGS[name]}))
    if name == "gpt2":
        weights = load_file(tmp_path / "base" / "model.safetensors")
        # As openai-community/gpt2 has them: mlx-lm puts its own prefix before these.
        bare = {k.removeprefix("transformer."): t for k, t in weights.items()}
        save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    theirs, _ = mlx_utils.load_model(tmp_path / "base")
    theirs = tuner.load_adapters(theirs, str(tmp_path / "mlx"))
    theirs.eval()
    given = tiny_models.inputs(model)
    found = torch.tensor(theirs(mx.array(given["input_ids"].numpy())).tolist())
    # mlx-lm's GELU is the approximation.
    torch.testing.assert_close(found, tiny_models.outputs(model, given), rtol=0, atol=1e-3)


def _qwen3_moe() -> Any:
    return tiny_models.seeded(tiny_models.qwen3_moe)


def _gpt_oss() -> Any:
    return tiny_models.seeded(tiny_models.gpt_oss)


def peft_experts(model: Any) -> Any:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted = peft.get_peft_model(model, config)
    shake(adapted)
    return adapted


def deltas_as_0_18(path: Path) -> dict[str, Tensor]:
    """PEFT 0.18.1's rule, written out: in is the second axis of every expert weight."""
    tensors = load_file(path / "adapter_model.safetensors")
    found: dict[str, Tensor] = {}
    for key in tensors:
        if ".experts" in key and key.endswith("lora_A.weight"):
            A = tensors[key]
            B = tensors[key.replace("lora_A", "lora_B")]
            A, B = A.reshape(4, -1, A.shape[-1]), B.reshape(B.shape[0], -1, 4)
            found[key] = torch.einsum("o r e, e r i -> e i o", B, A) * 2.0
    return found


@pytest.mark.parametrize("build", [_qwen3_moe, _gpt_oss])
def test_expert_layouts_hold_the_same_change(build: Any, tmp_path: Path) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    adapted = peft_experts(base)
    adapted.save_pretrained(tmp_path / "new")
    given = {"input_ids": torch.arange(3, 12)[None]}
    wanted = tiny_models.outputs(adapted, given)
    record = convert(tmp_path / "new", tmp_path / "old", "peft-0.18", base=str(tmp_path / "base"))
    assert (record["moved"], record["as_they_were"]) == ((4, 0) if build is _qwen3_moe else (0, 4))
    wrappers = [m for m in adapted.modules() if type(m).__name__ == "ParamWrapper"]
    live = sorted((m.get_delta_weight("default").detach() for m in wrappers), key=lambda t: t.shape)
    old = sorted(deltas_as_0_18(tmp_path / "old").values(), key=lambda t: t.shape)
    for mine, theirs in zip(live, old, strict=True):
        torch.testing.assert_close(theirs, mine)
    # Back to today's layout, and into a fresh model of today's PEFT.
    convert(tmp_path / "old", tmp_path / "again", "peft-0.19", base=str(tmp_path / "base"))
    fresh = peft.PeftModel.from_pretrained(build(), tmp_path / "again")
    torch.testing.assert_close(tiny_models.outputs(fresh, given), wanted)
    with pytest.raises(RequestError, match="stacked expert weights"):
        convert(tmp_path / "new", tmp_path / "no", "mlx", base=str(tmp_path / "base"))


def test_expert_weights_of_another_base(tmp_path: Path) -> None:
    peft_experts(_qwen3_moe()).save_pretrained(tmp_path / "new")
    tiny_models.build("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterFileError, match="no update of stacked expert weights"):
        convert(tmp_path / "new", tmp_path / "old", "peft-0.18", base=str(tmp_path / "base"))
