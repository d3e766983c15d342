"""DPO, IPO, ORPO and KTO through the trainer: they learn, and begin where they must."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_runs
from lorakit.adapters.adapter import Adapter
from lorakit.errors import ConfigError, TrainingError
from lorakit.methods.lora import LoraMethod
from lorakit.train.config import TrainConfig
from lorakit.train.objectives import preference_learner
from lorakit.train.run import train

TASKS: dict[str, dict[str, Any]] = {
    "dpo": {"task": "dpo", "preference": {"beta": 0.4, "label_noise": 0.1}},
    "ipo": {"task": "dpo", "preference": {"beta": 0.4, "loss": "ipo"}},
    "orpo": {"task": "orpo", "preference": {"beta": 0.4}},
    "kto": {"task": "kto", "preference": {"beta": 0.4, "undesirable_weight": 1.3}},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preference")
    tiny_runs.write_model(directory / "model")
    rng = random.Random(3)
    for name, count in (("train", 24), ("validation", 8)):
        # What is preferred can be learned: an answer that repeats the prompt's first word.
        rows = []
        for _ in range(count):
            words = rng.choices(tiny_runs.WORDS, k=rng.randint(2, 9))
            answers = {"chosen": f"{words[0]} w1", "rejected": "w2 " + rng.choice(["w3", "w4 w5"])}
            rows.append({"prompt": " ".join(words), **answers})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


def config_of(directory: Path, name: str, output: str, **more: Any) -> TrainConfig:
    values = tiny_runs.values(directory, output, lr=0.02, batch_size=4, gradient_accumulation=1)
    values["lora"]["dropout"] = 0.1
    return TrainConfig.from_dict({**values, **TASKS[name], **more})


@pytest.mark.parametrize("name", TASKS)
def test_it_learns_which_answer_is_preferred(directory: Path, name: str) -> None:
    result = train(config_of(directory, name, f"{name}-run"), say=lambda _line: None)
    lines = [json.loads(n) for n in (result.directory / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if "eval_loss" in line]
    assert evals[-1]["eval_loss"] < lines[0]["loss"]
    assert evals[-1]["eval_reward_margin"] > 0.05
    if name != "kto":
        assert evals[-1]["eval_reward_accuracy"] > 0.8
    passport = json.loads((result.adapter / "lorakit.json").read_text())
    assert passport["preference"] == {"task": TASKS[name]["task"], "beta": 0.4}


def test_the_first_loss_is_log_2_and_accumulation_changes_nothing(directory: Path) -> None:
    first: list[list[float]] = []
    for batch_size, accumulation in ((6, 1), (3, 2)):
        config = config_of(directory, "dpo", f"dpo-{batch_size}", preference={"beta": 0.3})
        values = config.to_dict()
        values["lora"]["dropout"] = 0.0
        values["train"] |= {
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "length_grouping": False,
            "epochs": 1,
        }
        run = train(TrainConfig.from_dict(values), say=lambda _line: None).directory
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first.append([line["loss"] for line in lines if "loss" in line])
    assert first[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert first[1] == pytest.approx(first[0], abs=2e-5)


def test_a_policy_that_does_not_begin_at_its_reference_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = LoraMethod.attach

    def moved(self: LoraMethod, model: Any) -> Any:
        report = attach(self, model)
        for name, tensor in self.state(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor.data, std=0.5)
        return report

    monkeypatch.setattr(LoraMethod, "attach", moved)
    with pytest.raises(TrainingError, match="does not begin at its reference"):
        train(config_of(directory, "dpo", "moved"), say=lambda _line: None)


def test_a_first_loss_that_is_not_log_2_is_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = preference_learner.dpo_losses
    monkeypatch.setattr(
        preference_learner, "dpo_losses", lambda *ratios, **options: 2 * wrong(*ratios, **options)
    )
    with pytest.raises(TrainingError, match="not log 2"):
        train(config_of(directory, "dpo", "not-log-2"), say=lambda _line: None)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"task": "sft", "preference": {"beta": 0.2}}, "preference"),
        ({"task": "orpo", "preference": {"loss": "ipo"}}, "preference.loss"),
        ({"preference": {"loss": "ipo", "label_noise": 0.1}}, "preference.label_noise"),
        ({"preference": {"beta": 0}}, "preference.beta"),
        ({"preference": {"label_noise": 0.5}}, "preference.label_noise"),
        ({"preference": {"desirable_from": 3}}, "preference.desirable_from"),
        ({"task": "kto", "preference": {}, "train": {"batch_size": 1}}, "train.batch_size"),
        ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing"),
    ],
)
def test_what_does_not_combine_is_refused(
    directory: Path, changes: dict[str, Any], where: str
) -> None:
    values = config_of(directory, "dpo", "bad", preference={}).to_dict()
    values["train"] |= changes.pop("train", {})
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict({**values, **changes})
    assert error.value.where == where


def test_ranks_may_move_while_preferences_are_learned(directory: Path) -> None:
    lora = {"r": "auto", "budget": 3000, "ranks": "adalora", "targets": "all-linear", "alpha": 6}
    config = config_of(directory, "dpo", "dpo-adalora", lora=lora, adalora={"every": 2})
    result = train(config, say=lambda _line: None)
    lines = [json.loads(n) for n in (result.directory / "metrics.jsonl").read_text().splitlines()]
    # lambda starts at zero, so the policy begins as its reference.
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    adapter = Adapter.load(result.adapter)
    assert adapter.num_params() <= 3000
    assert len({factors.r for factors in adapter.factors.values()}) > 1
