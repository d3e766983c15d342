"""kohya's names: what they may mean, and what must not be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import tiny_models
from learned import attach_learned
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.foreign import Conversion
from lorakit.formats.kohya import KohyaFormat
from lorakit.formats.peft import read_adapter

Q0, Q1 = "model_layers_0_self_attn_q_proj", "model_layers_1_self_attn_q_proj"


def update(key: str, *, seed: int, r: int = 3, alpha: float | None = 7.5) -> dict[str, Tensor]:
    """One update of the tiny Llama's q_proj (32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{key}.lora_down.weight": torch.randn(r, 32, generator=generator),
        f"{key}.lora_up.weight": torch.randn(32, r, generator=generator),
    }
    return tensors if alpha is None else {**tensors, f"{key}.alpha": torch.tensor(alpha)}


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_models.build("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path / "lora.safetensors")
    return path / "lora.safetensors"


def test_two_encoders_that_adapt_one_module_are_refused(base: str, tmp_path: Path) -> None:
    first, second = f"lora_te1_{Q0}", f"lora_te2_{Q0}"
    file = written({**update(first, seed=1), **update(second, seed=2)}, tmp_path)
    with pytest.raises(AdapterFileError, match="one module") as caught:
        convert(file, tmp_path / "made", "peft", base=base)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert "--prefix" in str(caught.value)


def test_the_prefix_chooses_among_several_encoders(base: str, tmp_path: Path) -> None:
    own = update(f"lora_te2_{Q0}", seed=2)
    unet = {
        f"lora_unet_x.{leaf}": torch.ones(3, 3) for leaf in ("lora_down.weight", "lora_up.weight")
    }
    file = written({**update(f"lora_te1_{Q0}", seed=1), **own, **unet}, tmp_path)
    with pytest.raises(AdapterFileError, match="--prefix lora_te1 or --prefix lora_te2"):
        convert(file, tmp_path / "made", "peft", base=base)
    with pytest.warns(LorakitWarning, match="2 updates of other names"):
        convert(
            file, tmp_path / "made", "peft", base=base, options=ConvertOptions(prefix="lora_te2")
        )
    (site,) = read_adapter(tmp_path / "made").factors.values()
    assert site.A.equal(own[f"lora_te2_{Q0}.lora_down.weight"])
    assert site.B.equal(own[f"lora_te2_{Q0}.lora_up.weight"])
    assert site.scaling == 2.5


def test_a_custom_prefix_is_read_back(base: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(targets=("q_proj",), r=3, alpha=7.5))
    adapter_from_model(model).save(tmp_path / "adapter")
    options = ConvertOptions(prefix="my_words")
    made = convert(tmp_path / "adapter", tmp_path / "made", "kohya", base=base, options=options)
    assert f"my_words_{Q0}.alpha" in load_file(made["output"])
    back = convert(made["output"], tmp_path / "back", "peft", base=base, options=options)
    assert back["num_updates"] == 2
    with pytest.raises(AdapterFileError, match="does not have") as caught:
        convert(made["output"], tmp_path / "other", "peft", base=base)
    assert "--prefix" in str(caught.value)
    wrong = ConvertOptions(prefix="my_word")
    with pytest.raises(AdapterFileError, match="begins with the prefix"):
        convert(made["output"], tmp_path / "other", "peft", base=base, options=wrong)


def test_an_alpha_without_its_matrices_is_refused(base: str, tmp_path: Path) -> None:
    orphan = f"lora_te_{Q1}.alpha"
    file = written({**update(f"lora_te_{Q0}", seed=1), orphan: torch.tensor(4.0)}, tmp_path)
    with pytest.raises(AdapterFileError, match="alpha without its") as caught:
        convert(file, tmp_path / "made", "peft", base=base)
    assert orphan in str(caught.value)


class Twins(nn.Module):
    """Two modules whose names differ where kohya writes an underscore for a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.block_a = nn.Module()
        self.block_a.proj = nn.Linear(32, 32)
        self.block = nn.Module()
        self.block.a_proj = nn.Linear(32, 32)
        self.block.other = nn.Linear(32, 32)


def test_names_that_underscores_make_alike_are_refused(tmp_path: Path) -> None:
    model = Twins()
    given = Conversion(model=model, base="twins")
    file = written(update("lora_te_block_a_proj", seed=1), tmp_path)
    with pytest.raises(AdapterFileError, match="several modules") as caught:
        KohyaFormat().read(file, given)
    assert "block_a.proj" in str(caught.value)
    assert "block.a_proj" in str(caught.value)
    attach_learned(model, LoraSpec(targets=("block.a_proj", "other"), r=2))
    (tmp_path / "made").mkdir()
    with pytest.raises(RequestError, match="alike") as told:
        KohyaFormat().write(adapter_from_model(model), tmp_path / "made", given)
    assert "block_a.proj" in str(told.value)
    # A module of another name is nobody's twin.
    fine = Twins()
    attach_learned(fine, LoraSpec(targets=("other",), r=2))
    file = KohyaFormat().write(adapter_from_model(fine), tmp_path / "made", given)
    assert list(KohyaFormat().read(file, given).factors) == ["block.other"]


@pytest.mark.parametrize("name", ["mlx", "loralib"])
def test_two_names_of_one_module_are_refused(name: str, base: str, tmp_path: Path) -> None:
    """`find` reads x, module.x and model.x alike."""
    first, second = "model.layers.0.self_attn.q_proj", "module.model.layers.0.self_attn.q_proj"
    a, b = torch.randn(32, 3), torch.randn(3, 32)
    tensors: dict[str, Tensor] = {}
    for key in (first, second):
        if name == "mlx":
            tensors |= {f"{key}.lora_a": a.clone(), f"{key}.lora_b": b.clone()}
        else:
            tensors |= {f"{key}.lora_A": a.T.clone(), f"{key}.lora_B": b.T.clone()}
    source: Any = tmp_path / "source"
    source.mkdir()
    if name == "mlx":
        save_file(tensors, source / "adapters.safetensors")
        (source / "adapter_config.json").write_text(
            '{"num_layers": -1, "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0}}'
        )
    else:
        source = source / "lora.pt"
        torch.save(tensors, source)
    with pytest.raises(AdapterFileError, match="one module") as caught:
        convert(source, tmp_path / "made", "peft", base=base, options=ConvertOptions(alpha=7.5))
    assert second in str(caught.value)


def test_clip_has_the_name_that_sd_scripts_knows(tmp_path: Path) -> None:
    """transformers 5 dropped `text_model.`, with which every such file is written."""
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "base")
    own = update("lora_te_text_model_encoder_layers_1_self_attn_q_proj", seed=1)
    base = str(tmp_path / "base")
    convert(written(own, tmp_path), tmp_path / "made", "peft", base=base)
    (site,) = read_adapter(tmp_path / "made").factors.values()
    assert site.module.endswith("encoder.layers.1.self_attn.q_proj")
    made = convert(tmp_path / "made", tmp_path / "back", "kohya", base=base)
    again = load_file(made["output"])
    assert again.keys() == own.keys()
    assert all(tensor.equal(again[name]) for name, tensor in own.items())


def test_rslora_scalings_survive_a_single_alpha_in_float32(base: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    spec = LoraSpec(targets="all-linear", r=3, alpha=7.7, scaling="alpha/sqrt(r)")
    attach_learned(model, spec)
    adapter_from_model(model).save(tmp_path / "adapter")
    made = convert(tmp_path / "adapter", tmp_path / "made", "kohya", base=base)
    convert(made["output"], tmp_path / "back", "peft", base=base)
    for factors in read_adapter(tmp_path / "back").factors.values():
        assert factors.scaling == pytest.approx(7.7 / 3**0.5, rel=1e-7)
