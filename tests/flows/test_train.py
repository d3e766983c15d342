"""A whole training run: what it leaves, what it refuses, when it stops."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.errors import (
    ConfigError,
    DataError,
    LorakitWarning,
    MemoryPlanError,
    ModelError,
    OutputError,
    TargetError,
    TrainingError,
)
from lorakit.formats.peft import load_adapter
from lorakit.models.label_head import label_nll
from lorakit.models.load import load_model
from lorakit.train import prepare
from lorakit.train.config import TrainConfig
from lorakit.train.metrics import MetricsLog
from lorakit.train.run import train

# A rate so high that the validation loss falls, and then rises: the best step is not the last.
WORSE_AGAIN = {
    "lr": 0.5,
    "schedule": "constant",
    "max_grad_norm": None,
    "eval_every": 1,
    "epochs": None,
    "max_steps": 5,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tiny_runs.write_all(tmp_path_factory.mktemp("train"))


@pytest.fixture
def directory(shared, tmp_path) -> Path:
    for name in ("model", "train.jsonl", "validation.jsonl"):
        (tmp_path / name).symlink_to(shared / name)
    return tmp_path


def quiet(config: TrainConfig):
    return train(config, say=lambda line: None)


def lines_of(directory: Path):
    text = (directory / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_leaves_an_adapter_a_record_and_metrics(directory):
    said: list[str] = []
    result = train(tiny_runs.config(directory), say=said.append)
    assert [line.partition(":")[0] for line in said[:5]] == [
        "data",
        "method",
        "steps",
        "precision",
        "memory",
    ]
    run = directory / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
    ]
    record = json.loads((run / "run.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["adapter"]["trainable_params"] == sum(
        tensor.numel() for tensor in load_file(run / "adapter/adapter_model.safetensors").values()
    )
    assert record["steps"] == {
        "done": 12,
        "max": 12,
        "per_epoch": 4,
        "stopped_early": False,
        "sessions": 1,
    }
    assert record["speed"]["num_examples"] == 3 * 22
    plan = record["plan"]
    assert plan["memory"]["predicted_bytes"] == record["memory"]["estimate"]["total_bytes"]
    measured_bytes = record["memory"]["peak_bytes"] - record["memory"]["process_bytes"]
    assert plan["memory"]["measured_bytes"] == measured_bytes
    assert plan["time"]["calibrated_on_steps"] == 3
    assert plan["time"]["measured_s"] == pytest.approx(record["speed"]["busy_s"])
    assert plan["time"]["predicted_s"] > 0
    assert record["speed"]["num_tokens"] == 3 * record["data"]["train"]["report"]["num_tokens"]
    assert record["metrics"]["last_loss"] < record["metrics"]["first_loss"]
    assert TrainConfig.from_yaml(run / "config.yaml") == tiny_runs.config(directory)
    lines = lines_of(directory)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 12]


def test_the_adapter_on_disk_has_the_loss_of_the_best_validation(directory):
    result = quiet(tiny_runs.config(directory, **WORSE_AGAIN))
    evaluations = {n["step"]: n["eval_loss"] for n in lines_of(directory) if "eval_loss" in n}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best < 5
    assert result.record["metrics"]["best_step"] == best
    assert result.record["metrics"]["final"]["step"] == best

    config = tiny_runs.config(directory)
    model, _ = load_model(config.model.ref)
    load_adapter(model, result.adapter)
    validation = prepare.prepare(config).data.validation
    total, count = 0.0, 0
    for example in validation:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            nll, num = label_nll(model, ids, torch.ones_like(ids), labels)
        total, count = total + float(nll), count + num
    assert total / count == pytest.approx(evaluations[best], abs=1e-5)


def test_without_keep_best_the_last_step_is_the_final_one(directory):
    result = quiet(tiny_runs.config(directory, keep_best=False, **WORSE_AGAIN))
    assert result.record["metrics"]["best_step"] < 5
    assert result.record["metrics"]["final"]["step"] == 5
    assert sorted(p.name for p in (directory / "run/checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]


def test_early_stopping_stops_after_its_patience(directory):
    result = quiet(
        tiny_runs.config(
            directory,
            lr=0.5,
            schedule="constant",
            epochs=20,
            eval_every=1,
            early_stopping_patience=3,
        )
    )
    steps = result.record["steps"]
    assert steps["stopped_early"]
    assert steps["done"] == result.record["metrics"]["best_step"] + 3
    assert steps["done"] < steps["max"]


def test_a_time_ends_the_run_and_its_learning_rate(directory):
    result = quiet(
        tiny_runs.config(
            directory, epochs=None, max_steps=100_000, max_minutes=0.02, schedule="cosine"
        )
    )
    steps = result.record["steps"]
    assert 2 < steps["done"] < 2000
    rates = [line.get("lr") for line in MetricsLog(result.directory / "metrics.jsonl").read()]
    rates = [rate for rate in rates if rate][2:]  # behind the warmup
    assert rates == sorted(rates, reverse=True)
    # By steps alone it would still be at its height; on a busy machine there are few of them.
    assert rates[-1] < 0.6 * rates[0]
    assert result.adapter.is_dir()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(directory):
    values = tiny_runs.values(directory, "one", max_steps=3, epochs=None)
    first = quiet(TrainConfig.from_dict(values))
    torch.rand(7)
    again = quiet(TrainConfig.from_dict({**values, "output": str(directory / "two")}))
    other = quiet(TrainConfig.from_dict({**values, "output": str(directory / "three"), "seed": 1}))
    names = ("adapter/adapter_model.safetensors",)
    for name in names:
        assert (first.directory / name).read_bytes() == (again.directory / name).read_bytes()
        assert (first.directory / name).read_bytes() != (other.directory / name).read_bytes()


def test_rows_are_held_out_for_validation(directory):
    values = tiny_runs.values(directory, max_steps=1, epochs=None)
    values["data"] = {"train": str(directory / "train.jsonl"), "validation_share": 0.25}
    record = quiet(TrainConfig.from_dict(values)).record
    assert record["data"]["train"]["num_rows"] == 16
    assert record["data"]["validation"]["num_rows"] == 6


def test_bf16_and_checkpointing_learn_too(directory):
    result = quiet(
        tiny_runs.config(directory, precision="bf16", gradient_checkpointing=True, lr=0.03)
    )
    metrics = result.record["metrics"]
    assert result.record["precision"] == "bf16"
    assert metrics["last_loss"] < metrics["first_loss"] - 0.1
    for tensor in load_file(result.adapter / "adapter_model.safetensors").values():
        assert tensor.dtype == torch.float32


def test_tensorboard_events_when_asked(directory):
    result = quiet(tiny_runs.config(directory, tensorboard=True, max_steps=3, epochs=None))
    assert list((result.directory / "tensorboard").glob("events.*"))


def test_tensorboard_that_is_not_installed_is_said_first(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed"):
        quiet(tiny_runs.config(directory, tensorboard=True))
    assert not (directory / "run").exists()


def test_a_loss_that_explodes_is_an_error_with_rows(directory):
    config = tiny_runs.config(directory, lr=1e30, warmup_steps=0, max_grad_norm=None)
    with pytest.raises(TrainingError, match="is not finite") as caught:
        quiet(config)
    assert caught.value.exit_code == 1


def changed(directory: Path, section: str, **new) -> TrainConfig:
    values = tiny_runs.values(directory)
    if section == "model":
        values["model"] = {"ref": values["model"]}
    values[section] = {**values[section], **new}
    return TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("section", "new", "kind", "says"),
    [
        ("model", {"ref": "no/such/place"}, ModelError, "no/such/place"),
        ("train", {"optimizer": "paged_adamw"}, ConfigError, "paged"),
        ("data", {"train": "none.jsonl"}, DataError, "none.jsonl"),
        ("data", {"columns": {"prompt": "question"}}, DataError, "question"),
        ("lora", {"targets": ["q_prj"]}, TargetError, "q_proj"),
        ("lora", {"targets": ["q_proj", "q_prj"]}, TargetError, "q_prj"),
    ],
)
def test_a_wrong_request_leaves_nothing_behind(directory, section, new, kind, says):
    with pytest.raises(kind) as caught:
        quiet(changed(directory, section, **new))
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (directory / "run").exists()


def test_an_output_that_is_not_empty_is_refused(directory):
    (directory / "run").mkdir()
    (directory / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        quiet(tiny_runs.config(directory))
    assert [path.name for path in (directory / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_cannot_fit_is_refused_before_loading(directory, monkeypatch):
    monkeypatch.setattr(prepare, "free_memory_bytes", lambda device: 100_000)
    with pytest.raises(MemoryPlanError, match="does not fit in memory"):
        quiet(tiny_runs.config(directory))
    assert not (directory / "run").exists()


def test_a_run_that_may_not_fit_warns_and_records_it(directory, monkeypatch):
    monkeypatch.setattr(prepare, "free_memory_bytes", lambda device: 200_000)
    with warnings.catch_warnings(), pytest.warns(LorakitWarning, match="may not fit in memory"):
        result = quiet(tiny_runs.config(directory, max_steps=1, epochs=None))
    assert "may not fit" in result.record["warnings"][0]
