from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

import tiny_models
from lorakit.errors import LorakitWarning, MemoryPlanError, ModelError
from lorakit.models import memory as loading
from lorakit.models.checkpoint import estimate_model_bytes, weight_files
from lorakit.models.load import load_base_model, load_config, load_model, load_tokenizer


def save(name, path, **options):
    """Save a tiny model with a word tokenizer; returns the model."""
    model = tiny_models.build(name)
    model.save_pretrained(path, **options)
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(path)
    return model


def edit_config(path, **changes):
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", sorted(set(tiny_models.BUILDERS) - {"vit"}))
def test_a_saved_model_comes_back_in_eval_mode_with_the_same_outputs(name, tmp_path):
    original = save(name, tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu")
    assert type(model) is type(original)
    assert not model.training
    given = tiny_models.inputs(model)
    expected = tiny_models.outputs(original, given)
    assert torch.equal(tiny_models.outputs(model, given), expected)
    assert tokenizer.pad_token_id == 0


def test_a_model_without_a_tokenizer_loads_alone_and_is_refused_with_one(tmp_path):
    tiny_models.build("vit").save_pretrained(tmp_path)
    assert load_base_model(tmp_path, device="cpu").config.model_type == "vit"
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(tmp_path)


def test_the_class_falls_back_on_the_model_type_when_no_architecture_is_named(tmp_path):
    save("t5", tmp_path)
    edit_config(tmp_path, architectures=None)
    model, _ = load_model(tmp_path, device="cpu")
    assert isinstance(model, T5ForConditionalGeneration)


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        (None, torch.bfloat16, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_dtypes(tmp_path, asked, stored, expected):
    tiny_models.build("llama").to(stored).save_pretrained(tmp_path)
    model = load_base_model(tmp_path, dtype=asked, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("asked", ["int8", "float", torch.int64])
def test_an_unknown_dtype_is_refused(tmp_path, asked):
    save("llama", tmp_path)
    with pytest.raises(ModelError, match="dtype"):
        load_model(tmp_path, dtype=asked)


def test_an_unknown_quantization_is_refused_and_says_so(tmp_path):
    save("llama", tmp_path)
    with pytest.raises(ModelError, match="quantization") as caught:
        load_model(tmp_path, "int3")
    assert caught.value.found == "'int3'"


def test_an_unknown_model_type_names_near_ones(tmp_path):
    save("llama", tmp_path)
    edit_config(tmp_path, model_type="lama")
    with pytest.raises(ModelError, match="'lama'") as caught:
        load_config(tmp_path)
    assert "llama" in (caught.value.expected or "")


def test_an_unknown_architecture_is_refused(tmp_path):
    save("llama", tmp_path)
    edit_config(tmp_path, architectures=["LlamaForEverything"])
    with pytest.raises(ModelError, match="LlamaForEverything"):
        load_model(tmp_path)


def test_missing_tensors_are_named_in_a_warning(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(LorakitWarning, match=r"1 tensors are not .*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path, device="cpu")


def test_extra_tensors_are_named_in_a_warning(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.7.extra.weight"] = torch.ones(2, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(LorakitWarning, match=r"no place in the model.*layers\.7\.extra"):
        load_model(tmp_path, device="cpu")


def test_a_misshapen_tensor_is_refused_by_name(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(5, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, device="cpu")
    assert "up_proj" in (caught.value.found or "")


def test_transformers_prints_nothing_of_its_own(tmp_path, capfd):
    save("llama", tmp_path)
    capfd.readouterr()
    load_model(tmp_path, device="cpu")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("damage", ["truncated", "hostile", "empty"])
def test_damaged_weights_are_refused(tmp_path, damage):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "hostile": struct.pack("<Q", 1 << 60) + content[8:],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load_model(tmp_path)
    assert str(file) in str(caught.value)


def test_a_tokenizer_that_is_damaged_is_refused(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_model_larger_than_the_free_memory_is_refused_before_loading(tmp_path, monkeypatch):
    save("llama", tmp_path)
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryPlanError, match="does not fit"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_estimate_is_the_bytes_that_are_loaded(tmp_path, dtype):
    save("llama-tied", tmp_path)
    model = load_base_model(tmp_path, dtype=dtype or "auto", device="cpu")
    loaded_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert estimate_model_bytes(tmp_path, dtype) == loaded_bytes


def test_sharded_weights_are_listed_counted_and_loaded(tmp_path):
    original = save("llama", tmp_path, max_shard_size="30KB")
    files = weight_files(tmp_path)
    assert len(files) > 2
    model = load_base_model(tmp_path, device="cpu")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert estimate_model_bytes(tmp_path) == sum(4 * p.numel() for p in original.parameters())
    files[1].unlink()
    with pytest.raises(ModelError, match="missing") as caught:
        load_base_model(tmp_path)
    assert files[1].name in (caught.value.found or "")


def test_an_index_that_points_outside_its_directory_is_refused(tmp_path):
    save("llama", tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="outside"):
        load_base_model(tmp_path)


def test_a_directory_with_pickles_only_is_refused(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors") as caught:
        load_base_model(tmp_path)
    assert caught.value.found == "pytorch_model.bin"


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "cuda0"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    tiny_models.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot compute there") as caught:
        load_base_model(tmp_path, device=device)
    assert device in str(caught.value)
