"""4-bit checkpoints of other tools, models that are not made of nn.Linear, and planned 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    BitsAndBytesConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
)

import tiny_models
from lorakit.errors import ModelError, SpecError, TargetError
from lorakit.methods.registry import build_method
from lorakit.models.empty import empty_model
from lorakit.models.load import load_base_model
from lorakit.models.nf4 import quantization_of
from lorakit.models.quantizable import (
    estimate_nf4_bytes,
    holds_four_bit,
    mark_four_bit,
    quantizable,
)
from lorakit.weights.nf4 import is_four_bit
from lorakit.weights.storage import base_weight


def stored_by_transformers(directory: Path, architecture: str = "llama", **options: Any) -> Path:
    """What `save_pretrained` of transformers' own 4-bit model leaves."""
    dense = tiny_models.build(architecture)
    dense.save_pretrained(directory / "dense")
    given: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, **{**given, **options})
    model = type(dense).from_pretrained(
        directory / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(directory / "stored")
    return directory / "stored"


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: base_weight(m).read() for n, m in model.named_modules() if is_four_bit(m)}


@pytest.mark.parametrize("computed", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_packed_numbers_are_bytes_whatever_they_were_stored_as(
    tmp_path: Path, storage: torch.dtype, computed: str
) -> None:
    """FSDP wants them stored as floats; a cast to the dtype computed in would destroy them."""
    stored = stored_by_transformers(tmp_path, bnb_4bit_quant_storage=storage)
    with safe_open(str(stored / "model.safetensors"), framework="pt") as file:
        packed = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert packed.dtype == storage
    model = load_base_model(stored, device="cpu", dtype=computed)
    ours = load_base_model(tmp_path / "dense", "nf4", device="cpu", dtype=computed)
    found, expected = weights(model), weights(ours)
    assert found.keys() == expected.keys()
    assert len(found) == 14
    for name in found:
        assert found[name].equal(expected[name]), name
    assert {p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") in found} == {
        torch.uint8
    }
    given = tiny_models.inputs(model)
    assert tiny_models.outputs(model, given).equal(tiny_models.outputs(ours, given))
    model.save_pretrained(tmp_path / "again")
    again = load_base_model(tmp_path / "again", device="cpu", dtype=computed)
    assert all(found[name].equal(value) for name, value in weights(again).items())


def test_fp4_is_read_as_it_is_and_never_called_nf4(tmp_path: Path) -> None:
    stored = stored_by_transformers(
        tmp_path, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False
    )
    model = load_base_model(stored, device="cpu")
    found = quantization_of(model)
    assert found is not None
    assert found.storage == "fp4"
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written["bnb_4bit_quant_type"] == "fp4"
    assert written["bnb_4bit_use_double_quant"] is False
    again = weights(load_base_model(tmp_path / "again", device="cpu"))
    assert all(value.equal(again[name]) for name, value in weights(model).items())
    with pytest.raises(ModelError, match="stored in fp4"):
        load_base_model(stored, "nf4", device="cpu")


def test_a_configuration_that_speaks_of_4_bits_over_dense_weights_is_refused(
    tmp_path: Path,
) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="should be in 4 bits is not") as caught:
        load_base_model(tmp_path, device="cpu")
    assert "layers.0" in (caught.value.where or "")


def test_falcon_s_own_linear_layers_are_quantized(tmp_path: Path) -> None:
    dense = tiny_models.build("falcon")
    dense.save_pretrained(tmp_path)
    model = load_base_model(tmp_path, "nf4", device="cpu")
    assert isinstance(model, FalconForCausalLM)
    names = set(weights(model))
    assert names == {
        name
        for name, module in dense.named_modules()
        if type(module).__name__ == "FalconLinear"
    }  # fmt: skip
    # The same products with the same numbers, by Falcon's own layers.
    by_hand = load_base_model(tmp_path, device="cpu")
    for name, value in weights(model).items():
        by_hand.get_parameter(f"{name}.weight").data = value
    given = tiny_models.inputs(model)
    torch.testing.assert_close(
        tiny_models.outputs(model, given),
        tiny_models.outputs(by_hand, given),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_a_model_without_linear_layers_is_refused_by_name(tmp_path: Path) -> None:
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="nothing of this model") as caught:
        load_base_model(tmp_path, "nf4", device="cpu")
    assert "ResNetModel" in str(caught.value)


REFUSED: dict[str, dict[str, Any]] = {
    "full": {},
    "last_layers": {"num_layers": 1},
    "last_layers, head": {"num_layers": 1, "head": "also"},
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("kind", ["live", "planned", "stored"])
def test_methods_that_train_4_bit_weights_are_refused_when_they_plan(
    tmp_path: Path, case: str, kind: str
) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path / "dense")
    if kind == "planned":
        model = empty_model(tmp_path / "dense")
        mark_four_bit(model, "nf4")
    else:
        model = load_base_model(tmp_path / "dense", "nf4", device="cpu")
    if kind == "stored":
        model.save_pretrained(tmp_path / "stored")
        model = empty_model(tmp_path / "stored")
        mark_four_bit(model, None)
    method = build_method(case.split(",")[0], REFUSED[case])
    with pytest.raises(SpecError, match="4-bit numbers have no gradient"):
        method.plan(model)
    with pytest.raises(SpecError, match="4-bit numbers have no gradient"):
        method.attach(model)


def test_what_stays_dense_can_be_trained_beside_4_bits(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    planned = empty_model(tmp_path)
    mark_four_bit(planned, "nf4")
    live = load_base_model(tmp_path, "nf4", device="cpu")
    for name, options in (
        ("last_layers", {"head": "only"}),
        ("bitfit", {"add": True}),
        ("lora", {"r": 3, "targets": "all-linear"}),
        ("houlsby", {"bottleneck": 4}),
    ):
        report = build_method(name, options).plan(planned)
        assert report == build_method(name, options).plan(live), name
        assert report.num_trainable > 0
    for model in (planned, live):
        with pytest.raises(TargetError, match="4-bit"):
            build_method("bitfit", {"add": True, "also_train": ["layers.0.mlp"]}).plan(model)


def test_marks_say_what_loading_will_do(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path / "dense")
    empty = empty_model(tmp_path / "dense")
    mark_four_bit(empty, None)
    assert not holds_four_bit(empty)
    mark_four_bit(empty, "nf4")
    assert holds_four_bit(empty)
    model = load_base_model(tmp_path / "dense", "nf4", device="cpu")
    assert set(quantizable(empty)) == set(weights(model))
    found = quantization_of(model)
    assert found is not None
    estimate = estimate_nf4_bytes(empty, torch.float32)
    assert estimate == pytest.approx(found.num_bytes + found.dense_bytes, rel=0.02)


def test_loading_gives_the_same_bits_as_quantizing_whole(tmp_path: Path) -> None:
    """transformers hands over tensors; quantizing them while reading changes nothing."""
    ours = load_base_model(_saved(tmp_path / "mine"), "nf4", device="cpu", dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(
        stored_by_transformers(tmp_path), dtype=torch.float32, device_map="cpu"
    )
    mine, its = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == its.keys()
    assert all(mine[name].data.equal(its[name].data) for name in mine)


def _saved(directory: Path) -> Path:
    tiny_models.build("llama").save_pretrained(directory)
    return directory
