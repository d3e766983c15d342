"""The measuring scripts: what they compute from steps, and that the GPU's runs at a tiny size."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiny_models
from learned import attach_learned
from lorakit.adapters.spec import LoraSpec

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return imported


def steps(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": s, "rows": 16.0, "tokens": 1600.0} for s in seconds]


def test_a_ratio_is_of_all_rows_and_its_spread_is_over_rounds(script) -> None:
    ratio = script("train_speed").speed_ratio(steps(2, 4, 2), steps(6, 6, 6), 0)
    assert ratio["value"] == pytest.approx(18 / 8, abs=1e-3)
    assert ratio["median_round"] == 3.0
    assert 1.5 <= ratio["low"] < ratio["value"] < ratio["high"] <= 3.0


def test_an_arm_with_another_loss_stops_the_run(script) -> None:
    module, args = script("train_speed"), argparse.Namespace(precision="fp32")
    equal = {"a": {"losses": [2.5, 1.0]}, "b": {"losses": [2.50005, 1.0]}, "c": {"losses": []}}
    module._require_equal_losses(args, equal)
    with pytest.raises(SystemExit, match="b computes another loss"):
        module._require_equal_losses(args, {**equal, "b": {"losses": [2.5, 1.001]}})


def test_arms_of_one_setting_come_together_and_another_setting_replaces_them(
    script, tmp_path: Path
) -> None:
    module, path = script("train_speed"), tmp_path / "result.json"

    def append(seed: int, steps: int, **arms: int) -> dict[str, dict[str, int]]:
        setting = {"precision": "fp32", "seed": seed, "steps": steps}
        module._append(path, {"setting": setting, "arms": arms})
        return {name: run["arms"] for name, run in json.loads(path.read_text())["runs"].items()}

    append(0, 3, a=1, b=1)
    append(1, 3, a=2)
    assert append(0, 3, b=3) == {"fp32-seed-0": {"a": 1, "b": 3}, "fp32-seed-1": {"a": 2}}
    assert append(0, 4, c=4)["fp32-seed-0"] == {"c": 4}


def test_every_means_is_measured_alone_and_all_settings_compute_one_loss(script) -> None:
    module = script("train_means")
    found = module.settings()
    assert found["none"] == frozenset()
    assert found["all"] == frozenset(module.MEANS)
    assert all(name in found[f"{name} alone"] for name in module.MEANS)
    assert "grouped" in found["packed alone"]
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(targets="all-linear", r=3, alpha=7.5))
    ids = torch.randint(3, tiny_models.VOCAB, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :4] = -100
    losses = []
    for means in found.values():
        with module.switched(model, means) as head:
            losses.append(head.loss(batch).item())
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
@pytest.mark.parametrize("arm", ["peft", "lorakit"])
def test_the_gpu_script_runs_at_a_tiny_size(script, storage: str, arm: str) -> None:
    module = script("train_gpu")
    args = argparse.Namespace(tiny=True, length=24, steps=1, peak_tflops=1.0)
    cell = {"arm": arm, "storage": storage, "batch": 2, "checkpointing": arm == "lorakit"}
    found = module._measure(args, cell)
    assert found["tokens_per_s"] > 0
    assert len(found["step_s"]) == 1


def test_without_a_gpu_only_the_tiny_size_is_offered(script, monkeypatch, capsys) -> None:
    module = script("train_gpu")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpu.py"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_is_missing_is_skipped_and_said(script, tmp_path: Path, monkeypatch) -> None:
    module = script("train_gpu")
    output = tmp_path / "gpu.json"
    arguments = ["--tiny", "--arms", "peft-liger", "--batch", "1", "--output", str(output)]
    monkeypatch.setattr(module, "_missing", lambda _arm: "liger_kernel is not installed")
    monkeypatch.setattr(sys, "argv", ["train_gpu.py", *arguments])
    module.main()
    result = json.loads(output.read_text())
    assert result["measured"] is False
    assert "not measured" in result["note"]
    assert [c["arms"]["peft-liger"]["skipped"] for c in result["cells"]] == [
        "liger_kernel is not installed"
    ] * 4
