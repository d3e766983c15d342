"""Several adapters in one batch: each is what its run alone is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.layers import decoder
from lorakit.models import fast_layers
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.run import sweep
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

# What each arm has of its own; together: ranks, targets, rules, rates, schedules, rows, seeds.
ARMS: list[dict[str, Any]] = [
    {"name": "wide", "lora.r": 8, "lora.targets": "all-linear", "train.lr": 0.01},
    {
        "name": "narrow",
        "lora.r": 2,
        "lora.alpha": 7,
        "lora.targets": ["q_proj", "down_proj"],
        "train.lr": 0.02,
        "train.schedule": "cosine",
        "train.max_grad_norm": 0.1,
        "train.label_smoothing": 0.1,
        "seed": 7,
        "data.train": "other.jsonl",
    },
    {
        "name": "dora",
        "lora.r": 3,
        "lora.update": "dora",
        "lora.targets": "mlp",
        "train.gradient_accumulation": 2,
        "train.batch_size": 2,
        "train.weight_decay": 0.1,
        "seed": 3,
    },
    {
        # Its name says "bias": what decays is decided by parameters' names.
        "name": "bias",
        "lora.bias": "lora_only",
        "lora.targets": "qv",
        "train.lora_plus_ratio": 4.0,
        "train.length_grouping": False,
        "train.weight_decay": 0.1,
    },
]


def sweep_values(directory: Path, **changes: Any) -> dict[str, Any]:
    cadence = {"save_every": 25, "eval_every": 25, "gradient_accumulation": 1}
    values = tiny_runs.values(directory, "sweep", **cadence, **changes)
    values["train"].pop("epochs")
    values["train"]["max_steps"] = 50
    values["lora"]["dropout"] = 0.0
    arms = [dict(arm) for arm in ARMS]
    for arm in arms:
        if "data.train" in arm:
            arm["data.train"] = str(directory / arm["data.train"])
    return {**values, "sweep": {"arms": arms, "together": 2}}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    directory = tiny_runs.write_all(tmp_path_factory.mktemp("together"))
    tiny_runs.write_rows(directory / "other.jsonl", 31, seed=5)
    spans: list[int] = []
    layer = decoder.decoder_layer

    def counted(*args: Any) -> torch.Tensor:
        spans.append(len(args[3].spans))
        return layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_layers, "decoder_layer", counted)
        sweep(SweepConfig.from_dict(sweep_values(directory)), say=lambda _: None)
    # The first two arms run packed and whole layers at a time, the others layer by layer.
    assert spans.count(2) >= 2 * 50
    return directory


@pytest.mark.parametrize("name", [arm["name"] for arm in ARMS])
def test_an_arm_is_its_run_alone(swept: Path, name: str) -> None:
    arm = swept / "sweep" / "arms" / name
    values = TrainConfig.from_yaml(arm / "config.yaml").to_dict()
    values["output"] = str(swept / "alone" / name)
    alone = train(TrainConfig.from_dict(values), say=lambda _: None)

    expected = load_file(alone.adapter / "adapter_model.safetensors")
    found = load_file(arm / "adapter" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
    together, own = _lines(arm), _lines(alone.directory)
    # The size of a small gradient is the most sensitive number of all.
    norms = [key for key in own if key.endswith("grad_norm")]
    assert len(norms) == 50
    for key in norms:
        assert together.pop(key) == pytest.approx(own.pop(key), rel=1e-3)
    assert together == pytest.approx(own, abs=1e-5)


def _lines(directory: Path) -> dict[str, float]:
    """Every number of metrics.jsonl that is not a time."""
    found: dict[str, float] = {}
    for text in (directory / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        found |= {f"{line['step']} {k}": v for k, v in line.items() if not k.endswith("_s")}
    return found
