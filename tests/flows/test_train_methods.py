"""Every method through the same trainer: it learns, a broken-off run goes on bit for bit, it loads.

A method that is added adds its line to RUNS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.errors import LorakitError, SpecError
from lorakit.methods.saved import load_saved
from lorakit.models.load import load_base_model
from lorakit.train.config import TrainConfig
from lorakit.train.prepare import prepare
from lorakit.train.run import train
from lorakit.train.trainer import AdapterTrainer

RUNS: dict[str, dict[str, Any]] = {
    "lora-plus": {
        "method": "lora",
        "lora": {"r": 4, "alpha": 12, "targets": ["q_proj", "embed_tokens"], "dropout": 0.1},
        "train": {"lora_plus_ratio": 8, "weight_decay": 0.1},
    },
    "full": {"method": "full", "train": {"weight_decay": 0.1}},
    "last-layers": {"method": "last_layers", "last_layers": {"num_layers": 1, "head": "also"}},
    "bitfit-added": {"method": "bitfit", "bitfit": {"add": True}, "train": {"lr": 0.05}},
    "prefix-embedding": {
        "method": "prefix_embedding",
        "prefix_embedding": {"prefix": 3, "infix": 2},
        "train": {"lr": 0.05},
    },
    "prefix-layer": {
        "method": "prefix_layer",
        "prefix_layer": {"prefix": 3, "infix": 1, "init": "normal", "also_train": ["model.norm"]},
        "train": {"lr": 0.05},
    },
    "lin": {"method": "lin", "lin": {"bottleneck": 6}, "train": {"lr": 0.02}},
    # What is dropped in each step is drawn at random: a resumed run draws the same.
    "adapterdrop-random": {
        "method": "adapterdrop",
        "adapterdrop": {
            "bottleneck": 6,
            "drop_first": 1,
            "at_random": True,
            "placement": "houlsby",
        },
        "train": {"lr": 0.02},
    },
}
NUM_GROUPS = {
    "lora-plus": 3,
    "full": 2,
    "last-layers": 2,
    "bitfit-added": 1,
    "prefix-embedding": 1,
    "prefix-layer": 2,
    "lin": 2,
    "adapterdrop-random": 2,
}

each_run = pytest.mark.parametrize("name", RUNS)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_all(tmp_path_factory.mktemp("methods"))


def config_of(directory: Path, name: str, output: str) -> TrainConfig:
    run = RUNS[name]
    values = tiny_runs.values(directory, output, **run.get("train", {}))
    del values["lora"]
    return TrainConfig.from_dict({**values, **{k: v for k, v in run.items() if k != "train"}})


class BrokenOffError(Exception):
    pass


@each_run
def test_it_learns_goes_on_bit_for_bit_and_loads(
    directory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    whole = train(config_of(directory, name, f"{name}-whole"), say=said.append)
    losses = whole.record["metrics"]
    assert losses["best_eval_loss"] < losses["first_loss"]
    broken = config_of(directory, name, f"{name}-broken")
    step_of = AdapterTrainer.training_step

    def breaks(self: AdapterTrainer, *args: Any) -> Any:
        if self.state.global_step == 7:
            raise BrokenOffError
        return step_of(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", breaks)
        with pytest.raises(BrokenOffError):
            train(broken, say=said.append)
    resumed = train(broken, resume=True, say=said.append)
    assert history(resumed.directory) == history(whole.directory)
    assert_same_checkpoint(resumed.directory, whole.directory, NUM_GROUPS[name])
    assert_loads(directory, whole.adapter, resumed.adapter)


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_s", "eval_s")} for line in lines]


def assert_same_checkpoint(one: Path, other: Path, num_groups: int) -> None:
    name = "checkpoints/step-00000012"
    state = "trained.safetensors"
    assert (one / name / state).read_bytes() == (other / name / state).read_bytes()
    left, right = (
        torch.load(run / name / "optimizer.pt", weights_only=True) for run in (one, other)
    )
    torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert len(left["param_groups"]) == num_groups


def assert_loads(directory: Path, *adapters: Path) -> None:
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    answers = []
    for adapter in adapters:
        model = load_base_model(directory / "model")
        base = model(ids).logits
        method = load_saved(model, adapter)
        answers.append(model(ids).logits)
        assert not torch.allclose(base, answers[-1], atol=1e-3)
        with method.disabled(model):
            assert model(ids).logits.equal(base)
    assert answers[0].equal(answers[1])


@each_run
def test_the_plan_is_said_and_recorded(directory: Path, name: str) -> None:
    config = config_of(directory, name, f"{name}-plan")
    prepared = prepare(config)
    said = "\n".join(prepared.lines(config))
    assert f"method: {config.method}, {prepared.plan.num_trainable:,} of" in said
    assert ("note: zero bias vectors are added" in said) == (name == "bitfit-added")
    trained_bytes = 4 * prepared.plan.num_trainable
    assert prepared.checkpoint_bytes == trained_bytes * (3 if name == "full" else 4)
    in_place = name != "lora-plus"
    assert prepared.memory.trained_bytes == 3 * trained_bytes + (
        prepared.plan.kept_bytes if in_place else trained_bytes
    ) + (4 * (prepared.plan.num_total - prepared.num_base_params) if in_place else 0)


def test_a_whole_model_is_not_written_twice_in_a_checkpoint(directory: Path) -> None:
    run = directory / "full-whole"
    if not run.exists():
        train(config_of(directory, "full", "full-whole"), say=lambda line: None)
    checkpoint = run / "checkpoints" / "step-00000012"
    assert not (checkpoint / "adapter").exists()
    model = load_base_model(run / "adapter")
    saved = dict(model.named_parameters())
    best = json.loads((run / "run.json").read_text())["metrics"]["best_step"]
    state = load_file(run / f"checkpoints/step-{best:08d}/trained.safetensors")
    assert state.keys() == saved.keys()
    assert all(saved[name].equal(value) for name, value in state.items())
    assert (run / "adapter" / "tokenizer.json").is_file()


def test_biases_that_are_not_there_are_refused_before_anything_is_written(directory: Path) -> None:
    values = {**tiny_runs.values(directory, "refused"), "method": "bitfit"}
    del values["lora"]
    with pytest.raises(SpecError, match="no bias vectors") as caught:
        train(TrainConfig.from_dict(values), say=print)
    assert caught.value.where == "bitfit.add"
    assert caught.value.exit_code == 2
    assert not (directory / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "bitfit"}, "section 'lora' is set"),
        ({"method": "full", "lora": {}, "train": {"lora_plus_ratio": 4}}, "no lora_B"),
        ({"lora": {}, "full": {"keep_base": True}}, "section 'full' is set"),
        ({"train": {"lora_plus_ratio": 0}}, "lora_plus_ratio"),
        ({"method": "last_layers", "lora": {}, "last_layers": {"layers": 2}}, "num_layers"),
        ({"method": "last_layers", "lora": {}, "last_layers": {"num_layers": 0}}, "at least 1"),
        ({"method": "last_layers", "lora": {}, "last_layers": {"head": "all"}}, "head"),
    ],
)
def test_sections_that_do_not_go_with_the_method(
    directory: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(LorakitError, match=match):
        TrainConfig.from_dict({**tiny_runs.values(directory), **changes})
