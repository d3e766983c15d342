"""Checkpoints that cannot be adapted are refused with the reason, before anything is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_runs
from lorakit.errors import ModelError
from lorakit.models.empty import empty_model
from lorakit.models.load import load_model
from lorakit.planner.plan import RunRequest, plan_run
from lorakit.train.run import train


@pytest.fixture
def model(tmp_path):
    return tiny_runs.write_model(tmp_path / "model")


def quantized_as(model, **facts) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": facts}))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("packed integers", "gptq")),
        ({"quant_method": "awq", "bits": 4}, ("packed integers", "awq")),
        ({"quant_method": "fp8"}, ("8-bit floats", "fp8")),
        ({"quant_method": "compressed-tensors"}, ("another library", "compressed-tensors")),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ("8-bit integers", "8 bits")),
        ({"quant_method": "tomorrow"}, ("cannot be adapted", "tomorrow")),
    ],
)
def test_a_quantization_is_refused_by_its_name(model, facts, words) -> None:
    quantized_as(model, **facts)
    for refused in (
        lambda: empty_model(model),
        lambda: load_model(model),
        lambda: load_model(model, quantize="nf4"),
        lambda: plan_run(RunRequest(model=str(model))),
    ):
        with pytest.raises(ModelError) as caught:
            refused()
        assert all(word in str(caught.value) for word in words)
        assert "dense checkpoint" in (caught.value.remedy or "")


def test_training_on_it_writes_nothing(tmp_path) -> None:
    directory = tiny_runs.write_all(tmp_path)
    quantized_as(directory / "model", quant_method="gptq", bits=4)
    with pytest.raises(ModelError, match="cannot be adapted"):
        train(tiny_runs.config(directory), say=lambda line: None)
    assert not (directory / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 32, dtype=torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 48, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(48, 32, dtype=torch.int8)),
    ],
)
def test_quantized_tensors_that_the_config_does_not_know_of(model, name, value) -> None:
    file = model / "model.safetensors"
    save_file({**load_file(file), name: value}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not say how") as caught:
        load_model(model)
    assert name in (caught.value.where or "")


@pytest.mark.parametrize(
    ("part", "whose"),
    [
        ("consolidated.00.pth", "Meta"),
        ("mp_rank_00", "Megatron"),
        ("model-rank-0-part-0.safetensors", "vLLM"),
        ("rank0.safetensors", "TensorRT"),
        ("__0_0.distcp", "PyTorch"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_tensor_parallel_parts_are_refused_by_their_writer(model, part, whose, has_config) -> None:
    (model / "model.safetensors").unlink()
    (model / part).touch()
    if not has_config:
        (model / "config.json").unlink()
    with pytest.raises(ModelError, match="in parts") as caught:
        load_model(model)
    assert whose in (caught.value.found or "")
