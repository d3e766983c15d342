"""A cell is scored on the base as its run kept it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_runs
from lorakit.compare.trained import load_cell_base, load_trained
from lorakit.train.config import TrainConfig
from lorakit.train.run import train


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_decided_for_the_run_is_what_is_loaded(method: str, tmp_path: Path) -> None:
    tiny_runs.write_all(tmp_path)
    values = tiny_runs.values(tmp_path, max_steps=2, epochs=None, save_every=2)
    values["model"] = {"ref": values["model"], "dtype": "bfloat16"}
    values["train"]["precision"] = "bf16"
    values["method"] = method
    values = values if method == "lora" else {k: v for k, v in values.items() if k != "lora"}
    config = TrainConfig.from_dict(values)
    result = train(config, say=lambda _: None)
    assert result.record["base"]["dtype"] == "bfloat16"
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    assert passport["base_dtype"] == "bfloat16"
    # The config leaves it open, and this machine would choose float32.
    silent = replace(config, model=replace(config.model, dtype=None))
    model, _ = load_trained(silent, result.adapter)
    for loaded in (model, load_cell_base(silent, result.adapter)):
        assert loaded.get_submodule("model.norm").weight.dtype == torch.bfloat16
    # Runs of earlier versions did not say.
    del passport["base_dtype"]
    (result.adapter / "lorakit.json").write_text(json.dumps(passport))
    assert load_cell_base(silent, result.adapter).dtype == torch.float32
