"""NF4 and the paged optimizer on CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_models
import tiny_runs
from lorakit.models.load import load_base_model
from lorakit.models.nf4 import quantization_of
from lorakit.train.config import TrainConfig
from lorakit.train.run import train
from lorakit.weights.nf4 import is_four_bit
from lorakit.weights.storage import base_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_weights_are_quantized_on_the_device_as_on_the_cpu(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    here = load_base_model(tmp_path, "nf4", device="cpu", dtype="float32")
    there = load_base_model(tmp_path, "nf4", device="cuda", dtype="float32")
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    assert quantization_of(here) == quantization_of(there)
    for mine, its in zip(here.modules(), there.modules(), strict=True):
        if is_four_bit(mine):
            torch.testing.assert_close(
                base_weight(mine).read(), base_weight(its).read().cpu(), rtol=1e-3, atol=1e-3
            )


def test_a_moved_model_keeps_its_weights(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    model = load_base_model(tmp_path, "nf4", device="cpu", dtype="float32")
    given = tiny_models.inputs(model)
    before = tiny_models.outputs(model, given)
    model.to("cuda")
    moved = {name: value.to("cuda") for name, value in given.items()}
    torch.testing.assert_close(
        tiny_models.outputs(model, moved).cpu(), before, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw"])
def test_a_run_learns_and_goes_on_after_a_checkpoint(tmp_path: Path, optimizer: str) -> None:
    tiny_runs.write_all(tmp_path)
    values = tiny_runs.values(tmp_path, optimizer=optimizer, precision="bf16", max_steps=6)
    values["train"].pop("epochs")
    values["model"] = {"ref": values["model"], "quantize": "nf4", "dtype": "bfloat16"}
    config = TrainConfig.from_dict(values)
    record = train(config, say=lambda line: None).record
    assert record["metrics"]["last_loss"] < record["metrics"]["first_loss"]
    values["train"]["max_steps"] = 8
    with pytest.warns(Warning, match="schedule"):
        again = train(TrainConfig.from_dict(values), resume=True, say=lambda line: None)
    assert again.record["steps"]["done"] == 8
