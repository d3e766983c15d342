"""Preferences after fine-tuning: a saved adapter trained further, or frozen beneath a new one."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit as lk
import tiny_runs
from lorakit.adapters.adapter import Adapter
from lorakit.errors import AdapterFileError, ConfigError, LorakitError, SpecError
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

IDS = torch.tensor([[1, 9, 23, 30, 41, 5, 12]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_runs.write_all(tmp_path_factory.mktemp("after"))
    rows = [
        {
            "prompt": f"w{i} w{i + 1}",
            "chosen": f" w{i} " + "w1 " * (i % 3),
            "rejected": " w2 w3" + " w7" * (i % 2),
        }
        for i in range(12)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "pairs.jsonl").write_text(text)
    train(_sft(directory, "sft"), say=lambda _line: None)
    return directory


def _sft(directory: Path, output: str, **more: Any) -> TrainConfig:
    options = {"epochs": None, "max_steps": 4, "warmup_steps": 0}
    return TrainConfig.from_dict({**tiny_runs.values(directory, output, **options), **more})


def _dpo(directory: Path, output: str, **more: Any) -> TrainConfig:
    plain: dict[str, Any] = {
        "model": str(directory / "model"),
        "data": {"train": str(directory / "pairs.jsonl")},
        "task": "dpo",
        "preference": {"beta": 0.3},
        "train": {
            "max_steps": 3,
            "batch_size": 4,
            "lr": 0.02,
            "schedule": "constant",
            "precision": "fp32",
            "save_every": 1,
        },
        "output": str(directory / output),
    }
    return TrainConfig.from_dict({**plain, **more})


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def _with(directory: Path, adapter: Path) -> torch.Tensor:
    model, _ = lk.load_model(directory / "model", dtype="float32")
    lk.load_adapter(model, adapter)
    return _logits(model)


def _with_peft(directory: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(directory / "model")
        return _logits(peft.PeftModel.from_pretrained(base, str(adapter)))


STACKED = {"r": 2, "alpha": 5, "targets": "all-linear"}


@pytest.mark.parametrize("how", ["continue_from", "on_top_of"])
def test_dpo_begins_at_the_adapter_it_is_given(directory: Path, how: str) -> None:
    sft = directory / "sft" / "adapter"
    before = {file.name: file.read_bytes() for file in sft.iterdir()}
    told: list[str] = []
    lora = {"lora": STACKED} if how == "on_top_of" else {}
    config = _dpo(directory, how, **{how: str(sft)}, **lora)
    run = train(config, say=told.append)
    assert any(f"reference: the adapter {sft}" in line for line in told)
    # The reference is the adapter as it started: distance 0 at the first step, log 2.
    assert _losses(run.directory)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert {file.name: file.read_bytes() for file in sft.iterdir()} == before

    ranks = {factors.r for factors in Adapter.load(run.adapter).factors.values()}
    assert ranks == ({4} if how == "continue_from" else {6})
    mine = _with(directory, run.adapter)
    assert not torch.allclose(mine, _with(directory, sft), atol=1e-3)
    torch.testing.assert_close(_with_peft(directory, run.adapter), mine, rtol=1e-5, atol=1e-5)
    passport = json.loads((run.adapter / "lorakit.json").read_text())
    assert passport["adapters"].keys() == {how}
    assert passport["preference"]["reference_sha256"] == passport["adapters"][how]


def test_fine_tuning_goes_on_where_it_stopped(directory: Path) -> None:
    sft = directory / "sft"
    config = _sft(directory, "more", continue_from=str(sft / "adapter"), lora={"dropout": 0.0})
    run = train(config, say=lambda _line: None)
    assert _losses(run.directory)[0] < _losses(sft)[0] - 0.05
    assert json.loads((run.adapter / "lorakit.json").read_text())["spec"]["dropout"] == 0.0


@pytest.mark.parametrize(
    "how", [pytest.param("continue_from", marks=pytest.mark.slow), "on_top_of"]
)
def test_a_stopped_run_goes_on_to_the_same_end(directory: Path, how: str) -> None:
    sft = str(directory / "sft" / "adapter")
    lora = {"lora": {**STACKED, "dropout": 0.2}} if how == "on_top_of" else {}
    whole = train(_dpo(directory, f"{how}-3", **{how: sft}, **lora), say=lambda _line: None)
    config = _dpo(directory, f"{how}-2", **{how: sft}, **lora)
    values = config.to_dict()
    short = TrainConfig.from_dict({**values, "train": {**values["train"], "max_steps": 2}})
    train(short, say=lambda _line: None)
    resumed = train(config, resume=True, say=lambda _line: None)
    one, two = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_keys_that_say_what_the_adapter_says_may_stand(directory: Path) -> None:
    sft = str(directory / "sft" / "adapter")
    spec = Adapter.load(sft).spec
    same = {"r": spec.r, "alpha": spec.alpha, "targets": spec.targets, "dropout": 0.1}
    config = _sft(directory, "same", continue_from=sft, lora=same)
    assert TrainConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.make_method().options()["r"] == spec.r
    # The default is a value like any other where somebody writes it down.
    with pytest.raises(ConfigError) as error:
        _sft(directory, "other", continue_from=sft, lora={"r": 8})
    assert error.value.expected == f"r: {spec.r}, as in {sft}"
    assert error.value.found == "r: 8"


def test_the_reference_may_be_another_model_than_the_start(directory: Path) -> None:
    sft = str(directory / "sft" / "adapter")
    told: list[str] = []
    config = _dpo(
        directory, "base", continue_from=sft, preference={"beta": 0.3, "reference": "base"}
    )
    run = train(config, say=told.append)
    assert any("the base, where the policy does not begin" in line for line in told)
    assert _losses(run.directory)[0] != pytest.approx(math.log(2), abs=1e-5)
    # Named by its directory, the start is the start.
    config = _dpo(directory, "named", continue_from=sft, preference={"beta": 0.3, "reference": sft})
    run = train(config, say=lambda _line: None)
    assert _losses(run.directory)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_another_adapter_in_its_place_is_not_resumed(directory: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "start"
    Adapter.load(directory / "sft" / "adapter").save(adapter)
    config = _dpo(directory, "swapped", continue_from=str(adapter))
    train(config, say=lambda _line: None)
    weights = adapter / "adapter_model.safetensors"
    other = Adapter.load(directory / "swapped" / "adapter")
    weights.unlink()
    other.save(tmp_path / "other")
    (tmp_path / "other" / weights.name).rename(weights)
    with pytest.raises(AdapterFileError, match="not the one this run was started with"):
        train(config, resume=True, say=lambda _line: None)


@pytest.mark.parametrize(
    ("changes", "kind", "where"),
    [
        ({"continue_from": "nowhere"}, AdapterFileError, "continue_from: nowhere"),
        ({"continue_from": "a", "on_top_of": "b"}, ConfigError, "continue_from and on_top_of"),
        ({"continue_from": "SFT", "lora": {"r": 3}}, ConfigError, "lora.r"),
        ({"continue_from": "SFT", "lora": {"r": 4, "alpha": 1}}, ConfigError, "lora.alpha"),
        ({"continue_from": "SFT", "lora": {"init": "pissa"}}, ConfigError, "lora.init"),
        ({"continue_from": "a", "lora": {"r": 8}}, AdapterFileError, "continue_from: a"),
        ({"on_top_of": "a", "method": "bitfit"}, ConfigError, "on_top_of"),
        ({"continue_from": "a", "task": "classify"}, ConfigError, "continue_from"),
        ({"on_top_of": "SFT", "lora": {"targets": "qv"}}, SpecError, "lora.targets"),
        ({"preference": {"reference": "x"}}, AdapterFileError, "preference.reference: x"),
        (
            {"task": "orpo", "preference": {"reference": "x"}},
            ConfigError,
            "preference.reference",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    directory: Path, changes: dict[str, Any], kind: type[LorakitError], where: str
) -> None:
    sft = str(directory / "sft" / "adapter")
    given = {key: sft if value == "SFT" else value for key, value in changes.items()}
    if given.get("task") == "classify":
        given["preference"] = {}
    with pytest.raises(kind) as error:
        train(_dpo(directory, "refused", **given), say=lambda _line: None)
    assert error.value.where == where
    assert not (directory / "refused").exists()
