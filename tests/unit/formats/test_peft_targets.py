"""Targets of a configuration, as PEFT itself reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists

import tiny_models
from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitWarning
from lorakit.formats.peft_targets import beyond_targets

NAMES = [
    f"model.{inner}"
    for i in range(3)
    for inner in (
        f"layers.{i}.self_attn.q_proj",
        f"layers.{i}.mlp.down_proj",
        f"layers.{i}.mlp.experts.2.q_proj",
    )
] + ["lm_head", "q_proj"]


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.1.mlp.down_proj", "proj"]},
        {"target_modules": r".*layers\.[01]\..*q_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*experts.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [2],
            "layers_pattern": ["h", "experts"],
        },
    ],
)
def test_the_same_modules_as_peft(given: dict[str, Any]) -> None:
    config = LoraConfig(**given)
    theirs = [name for name in NAMES if not check_target_module_exists(config, name)]
    assert beyond_targets(json.loads(json.dumps(config.to_dict(), default=list)), NAMES) == theirs


def test_updates_beyond_the_targets_are_said(tmp_path: Path) -> None:
    model = get_peft_model(tiny_models.build("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    Adapter.load(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "layers_to_transform": [1]}))
    with pytest.warns(LorakitWarning, match=r"\(1, first model\.layers\.0\."):
        assert len(Adapter.load(tmp_path).factors) == 2
