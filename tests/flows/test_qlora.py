"""QLoRA from the config to the adapter: tiny for every promise, SmolLM2 once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.adapters.fingerprint import fingerprint
from lorakit.errors import ConfigError, LorakitWarning, ModelError, SpecError
from lorakit.formats.peft import load_adapter
from lorakit.models.load import load_base_model
from lorakit.train.config import TrainConfig
from lorakit.train.prepare import prepare
from lorakit.train.run import train


def config(directory: Path, output: str, **train_options: Any) -> TrainConfig:
    values = tiny_runs.values(directory, output, **train_options)
    return TrainConfig.from_dict({**values, "model": {"ref": values["model"], "quantize": "nf4"}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_runs.write_all(tmp_path_factory.mktemp("qlora"))
    train(config(directory, "whole"), say=lambda line: None)
    return directory


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "adapter" / "adapter_model.safetensors"))


def test_a_run_learns_and_says_what_is_in_4_bits(whole: Path) -> None:
    record = json.loads((whole / "whole" / "run.json").read_text())
    found = record["base"]["quantization"]
    assert found["storage"] == "nf4"
    assert found["num_layers"] == 14
    # Scales of few blocks weigh more: tiny layers cost a little over 4.127 bits.
    assert 4.12 < found["bits_per_param"] < 4.3
    assert record["metrics"]["last_loss"] < record["metrics"]["first_loss"]
    passport = json.loads((whole / "whole" / "adapter" / "lorakit.json").read_text())
    assert passport["quantization"] == found
    assert passport["base"]["storage"] == "nf4"
    dense = fingerprint(load_base_model(whole / "model", device="cpu"))
    assert passport["base"]["sha256"] == dense.sha256


def test_a_resumed_run_is_the_whole_run_bit_for_bit(whole: Path) -> None:
    shutil.copytree(whole / "whole", whole / "again")
    steps = sorted((whole / "again" / "checkpoints").iterdir(), key=_step)
    for later in steps[1:]:
        shutil.rmtree(later)
    shutil.rmtree(whole / "again" / "adapter")
    with warnings.catch_warnings():
        # The best one so far may have made room for a better one since.
        warnings.simplefilter("ignore", LorakitWarning)
        train(config(whole, "again"), resume=True, say=lambda line: None)
    mine, its = tensors(whole / "again"), tensors(whole / "whole")
    assert mine.keys() == its.keys()
    assert all(mine[name].equal(its[name]) for name in its)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def test_checkpointed_activations_give_the_same_adapter(whole: Path) -> None:
    options = {"gradient_checkpointing": True, "max_steps": 3, "epochs": None}
    train(config(whole, "less", **options), say=lambda line: None)
    train(config(whole, "more", max_steps=3, epochs=None), say=lambda line: None)
    mine, its = tensors(whole / "less"), tensors(whole / "more")
    for name in its:
        torch.testing.assert_close(mine[name], its[name], rtol=1e-4, atol=1e-5)


def test_the_adapter_loads_on_the_dense_base_with_a_note(whole: Path) -> None:
    model = load_base_model(whole / "model", device="cpu")
    with pytest.warns(LorakitWarning, match="trained beside nf4"):
        load_adapter(model, whole / "whole" / "adapter")


@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_methods_that_train_the_weights_are_refused_before_anything_is_read(
    whole: Path, method: str
) -> None:
    values = {**tiny_runs.values(whole, "refused"), "method": method}
    values["model"] = {"ref": values["model"], "quantize": "nf4"}
    del values["lora"]
    with pytest.raises(SpecError, match="4-bit numbers have no gradient"):
        prepare(TrainConfig.from_dict(values))
    assert not (whole / "refused").exists()


def test_a_missing_bitsandbytes_is_refused_with_the_extra(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.weights import nf4

    nf4.require_nf4.cache_clear()
    monkeypatch.setattr("lorakit.weights.nf4.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="bitsandbytes") as caught:
        prepare(config(whole, "refused"))
    assert "lorakit[quant]" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a CPU only")
def test_a_paged_optimizer_is_refused_on_a_cpu(whole: Path) -> None:
    with pytest.raises(ConfigError, match="unified memory"):
        prepare(config(whole, "refused", optimizer="paged_adamw"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantizing_on_load_never_holds_a_dense_copy(tmp_path: Path) -> None:
    benchmark = Path(__file__).parents[2] / "benchmarks" / "nf4_memory.py"
    words = ["--layers", "16", "--hidden", "768", "--shard", "20MB", "--scratch", str(tmp_path)]
    words += ["--output", str(tmp_path / "found.json")]
    words += ["--ways", "nf4, float32", "nf4, bfloat16", "dense, float32"]
    subprocess.run([sys.executable, str(benchmark), *words], capture_output=True, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    stored = rows["nf4, float32"]["quantization"]
    assert stored["num_bytes"] <= 0.26 * stored["bf16_bytes"]
    assert rows["dense, float32"]["peak_share"] > 1.9  # what is watched is seen
    # The 4-bit weights are 0.258; beside them one tensor as it is read (0.01 of the model each in
    # bfloat16) and what the pieces of it need.
    assert rows["nf4, bfloat16"]["peak_share"] < 0.38
    assert rows["nf4, float32"]["peak_share"] < 0.42


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_learns_in_4_bits(tmp_path: Path, smollm2_path: Path) -> None:
    tiny_runs.write_rows(tmp_path / "train.jsonl", 8)
    values = {
        "model": {"ref": str(smollm2_path), "quantize": "nf4"},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "lora": {"r": 4, "targets": "all-linear"},
        "train": {"max_steps": 3, "batch_size": 4, "lr": 1e-3},
        "output": str(tmp_path / "run"),
    }
    result = train(TrainConfig.from_dict(values), say=lambda line: None)
    found = result.record["base"]["quantization"]
    assert found["num_bytes"] <= 0.30 * found["bf16_bytes"]
    assert found["bits_per_param"] == pytest.approx(4.127, abs=0.001)
    assert result.record["metrics"]["last_loss"] < result.record["metrics"]["first_loss"]
