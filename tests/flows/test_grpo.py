"""GRPO through the trainer: a plain gradient, rewards that rise, a resumed run that is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import lorakit as lk
import tiny_runs
from lorakit.errors import ConfigError, TrainingError
from lorakit.models.fast_layers import use_fast_layers
from lorakit.processes import Processes
from lorakit.report.collect import collect
from lorakit.report.html import write_report
from lorakit.sweep.arms import _check
from lorakit.train.combine import require_processes
from lorakit.train.config import TrainConfig
from lorakit.train.objectives import grpo_learner
from lorakit.train.prepare import prepare
from lorakit.train.run import train

# Of a random model's words, about a sixth are among the first ten.
REWARD = """
def low(answer, row):
    words = answer.split()
    good = sum(word in {f"w{i}" for i in range(10)} for word in words)
    return good / 4 - 0.1 * (len(words) < 3)
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grpo")
    tiny_runs.write_all(directory)
    # A random head is so flat that no hidden state makes a word likely.
    model = LlamaForCausalLM.from_pretrained(directory / "model")
    model.lm_head.weight.data *= 12
    model.save_pretrained(directory / "model")
    (directory / "own.py").write_text(REWARD)
    return directory


def config_of(directory: Path, output: str, *, grpo: dict[str, Any], **train: Any) -> TrainConfig:
    values = tiny_runs.values(directory, output, **{"gradient_accumulation": 1, **train})
    values["lora"]["dropout"] = 0.0
    section = {"reward": f"{directory / 'own.py'}:low", "max_new_tokens": 4, **grpo}
    return TrainConfig.from_dict({**values, "task": "grpo", "grpo": section})


def plain_loss(
    model: PreTrainedModel, groups: list[Any], options: dict[str, Any]
) -> tuple[Tensor, float]:
    """GRPO written down: one forward pass of one row for each answer; and the mean k3."""
    temperature, beta = options.get("temperature", 1.0), options.get("beta", 0.0)
    total, divergences = torch.zeros(()), []
    for group in groups:
        rewards = torch.tensor(group.rewards)
        advantages = rewards - rewards.mean()
        if options.get("scale_rewards", True):
            advantages = advantages / (rewards.std() + 1e-4)
        for answer, advantage in zip(group.answers, advantages, strict=True):
            if options.get("mask_truncated") and not answer.finished:
                continue
            ids = torch.tensor([group.prompt + answer.ids])
            place = len(group.prompt)

            def logps_of(ids: Tensor = ids, place: int = place) -> Tensor:
                logits = model(input_ids=ids).logits[0, place - 1 : -1] / temperature
                return logits.log_softmax(-1).gather(1, ids[0, place:, None])[:, 0]

            logps = logps_of()
            ratio = (logps - logps.detach()).exp()
            with torch.no_grad(), lk.use(model, None):
                reference = logps_of()
            distance = reference - logps
            k3 = distance.exp() - distance - 1
            divergences += k3.detach().tolist()
            tokens = 4 if options.get("normalise") == "constant" else len(answer.ids)
            total = total - (advantage * ratio - beta * k3).sum() / tokens / len(group.answers)
    return total, sum(divergences) / max(1, len(divergences))


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({}, True),
        ({"scale_rewards": False, "normalise": "constant", "mask_truncated": True}, False),
        ({"temperature": 0.6, "beta": 0.3}, True),
    ],
    ids=["grpo", "dr-grpo-padded", "kl"],
)
def test_the_gradient_is_that_of_a_plain_implementation(
    directory: Path, options: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config_of(directory, "never", grpo={"num_samples": 5, **options}).to_dict()
    values["model"] = {"ref": values["model"]["ref"], "attention": None if packed else "eager"}
    config = TrainConfig.from_dict(values)
    prepared = prepare(config)
    objective = prepared.objective
    model = objective.load_model(torch.float32)
    method = config.make_method()
    method.attach(model)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in method.state(model).items():
        if "lora_B" in name:
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    use_fast_layers(model)
    learner: Any = objective.bind(model, method, fresh=True)
    seen: list[Any] = []
    to_learn = grpo_learner.GrpoLearner._to_learn
    monkeypatch.setattr(
        grpo_learner.GrpoLearner,
        "_to_learn",
        lambda self, groups: (seen.extend(groups), to_learn(self, groups))[1],
    )
    batch = objective.collate([prepared.data.train[i] for i in (0, 3, 5)])
    model.train()
    loss = learner.loss(batch, num_items=torch.tensor(7), label_smoothing=0.0)
    learned = list(method.state(model).values())
    found = torch.autograd.grad(loss, learned)
    assert len(seen) == 3
    assert len({round(r, 4) for group in seen for r in group.rewards}) > 2
    assert learner.label_head.packs == packed
    model.eval()
    total, kl = plain_loss(model, seen, options)
    expected = torch.autograd.grad(total / 7, learned)
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)
    noted = learner.noted()
    rewards = torch.tensor([group.rewards for group in seen])
    assert noted["reward"] == pytest.approx(float(rewards.mean()), abs=1e-6)
    if options.get("beta"):
        assert noted["kl"] == pytest.approx(kl, rel=1e-3)


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("step_s", "eval_s", "sample_s")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.slow
def test_rewards_rise(directory: Path) -> None:
    config = config_of(
        directory,
        "rising",
        grpo={"num_samples": 6},
        epochs=None,
        max_steps=24,
        lr=0.02,
        eval_every=12,
        save_every=12,
    )
    result = train(config, say=lambda _line: None)
    lines = history(result.directory)
    rewards = [line["reward"] for line in lines if "reward" in line]
    first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert first < 0.35 < 0.65 < last
    evals = [line for line in lines if "eval_reward" in line]
    assert evals[-1]["eval_reward"] > 0.65
    assert evals[-1]["eval_loss"] == -evals[-1]["eval_reward"]
    assert result.record["metrics"]["final"]["eval_reward"] == max(
        line["eval_reward"] for line in evals
    )


def check_record(run: Path, config: TrainConfig) -> None:
    """What a run leaves in writing: its lines, its passport, the drawing of its rewards."""
    names = {"reward_std", "no_signal", "answer_tokens", "truncated", "sampled_tokens", "sample_s"}
    first = json.loads((run / "metrics.jsonl").read_text().split("\n")[0])
    assert names <= set(first)
    passport = json.loads((run / "adapter" / "lorakit.json").read_text())
    assert passport["grpo"]["num_samples"] == config.grpo.num_samples
    report = collect(run)
    assert report["curve"]["measure"] == "reward"
    assert report["curve"]["train"][0] == [1, first["reward"]]
    write_report(report, run / "report.html")
    page = (run / "report.html").read_text()
    assert "mean reward" in page
    assert "validation reward" in page


def test_a_resumed_run_samples_the_same(directory: Path) -> None:
    grpo = {"num_samples": 4, "beta": 0.1}
    options = {"epochs": None, "max_steps": 6, "keep_checkpoints": 9, "eval_every": 2}
    values = config_of(directory, "whole", grpo=grpo, **options).to_dict()
    values["lora"]["dropout"] = 0.2
    config = TrainConfig.from_dict(values)
    train(config, say=lambda _line: None)
    check_record(directory / "whole", config)
    shutil.copytree(directory / "whole", directory / "again")
    shutil.rmtree(directory / "again" / "checkpoints" / "step-00000006")
    values["output"] = str(directory / "again")
    said: list[str] = []
    train(TrainConfig.from_dict(values), resume=True, say=said.append)
    assert any("resuming from step 4" in line for line in said)
    assert history(directory / "again") == history(directory / "whole")
    name = "adapter/adapter_model.safetensors"
    assert (directory / "again" / name).read_bytes() == (directory / "whole" / name).read_bytes()


def test_a_run_goes_on_with_its_own_reward_alone(directory: Path) -> None:
    file = directory / "changing.py"
    file.write_text("def flat(answer, row):\n    return 0.1\n")
    grpo = {"reward": f"{file}:flat", "num_samples": 3}
    length = {"epochs": None, "save_every": 1, "eval_every": 9}
    train(config_of(directory, "goes_on", grpo=grpo, max_steps=1, **length), say=lambda _: None)
    file.write_text("def flat(answer, row):\n    return 0.2\n")
    longer = config_of(directory, "goes_on", grpo=grpo, max_steps=2, **length)
    with pytest.raises(ConfigError, match="reward function is not the one"):
        train(longer, resume=True, say=lambda _: None)


def test_equal_rewards_are_a_step_without_a_gradient(directory: Path) -> None:
    (directory / "flat.py").write_text("def flat(answer, row):\n    return 0.1\n")
    grpo = {"reward": f"{directory / 'flat.py'}:flat", "num_samples": 3}
    config = config_of(directory, "flat", grpo=grpo, epochs=None, max_steps=2)
    result = train(config, say=lambda _line: None)
    lines = [line for line in history(result.directory) if "reward" in line]
    assert [line["loss"] for line in lines] == [0.0, 0.0]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]
    assert lines[0]["no_signal"] == 1.0
    assert lines[0]["learned_tokens"] == 0


@pytest.mark.slow
def test_after_sft_it_begins_at_the_saved_adapter(directory: Path) -> None:
    sft = tiny_runs.config(directory, "sft", epochs=None, max_steps=4, warmup_steps=0)
    saved = train(sft, say=lambda _line: None).adapter
    grpo = {"reward": {"token_f1": 1.0, f"{directory / 'own.py'}:low": 0.5}, "beta": 0.2}
    length = {"epochs": None, "max_steps": 2, "warmup_steps": 0}
    values = config_of(directory, "after", grpo=grpo, **length).to_dict()
    values["lora"] = {"dropout": 0.0}
    values["continue_from"] = str(saved)
    result = train(TrainConfig.from_dict(values), say=lambda _line: None)
    lines = [line for line in history(result.directory) if "reward" in line]
    # The reference is the saved adapter, not the base.
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[1]["kl"] > 1e-6


def test_a_model_that_does_not_learn_what_it_samples_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = grpo_learner.write_answers

    def wrong(model: Any, prompts: Any, *others: Any, **options: Any) -> Any:
        return written(model, [prompt[::-1] for prompt in prompts], *others, **options)

    monkeypatch.setattr(grpo_learner, "write_answers", wrong)
    with pytest.raises(TrainingError, match="another probability"):
        train(config_of(directory, "wrong", grpo={}), say=lambda _line: None)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"grpo": {"num_samples": 1}}, "grpo.num_samples"),
        ({"grpo": {"temperature": 0.0}}, "grpo.temperature"),
        ({"grpo": {"max_new_tokens": 0}}, "grpo.max_new_tokens"),
        ({"grpo": {"beta": -0.1}}, "grpo.beta"),
        ({"grpo": {"reward": None}}, "grpo.reward"),
        ({"grpo": {"reward": {}}}, "grpo.reward"),
        ({"grpo": {"reward": "bleu"}}, "grpo.reward"),
        ({"grpo": {"reward": "cider"}}, "grpo.reward"),
        ({"grpo": {"reward": "perplexity"}}, "grpo.reward"),
        ({"grpo": {"reward": {"exact_match": 0}}}, "grpo.reward.exact_match"),
        ({"task": "sft"}, "grpo"),
        ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing"),
        ({"data": {"max_length": 9}}, "data.on_too_long"),
        ({"data": {"completion_only": False}}, "data.completion_only"),
        ({"lora": {"init": "eva"}}, "lora.init"),
        ({"method": "prefix_layer", "lora": None}, "method"),
    ],
)
def test_what_does_not_combine_is_refused(
    directory: Path, changes: dict[str, Any], where: str
) -> None:
    values = config_of(directory, "bad", grpo={}).to_dict()
    for section in ("train", "data", "grpo", "lora"):
        if section in changes and changes[section] is None:
            del values[section]
        else:
            values[section] = {**values[section], **changes.get(section, {})}
    values |= {k: v for k, v in changes.items() if k in ("task", "method")}
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(values)
    assert error.value.where == where


def test_sweeps_and_several_processes_are_refused(directory: Path) -> None:
    config = config_of(directory, "alone", grpo={})
    with pytest.raises(ConfigError, match="share its batch"):
        _check(config, None)
    with pytest.raises(ConfigError, match="sample answers of their own"):
        require_processes(config, Processes(rank=0, num=2, num_here=2), sharded=False)


def test_long_prompts_are_dropped_or_refused(directory: Path) -> None:
    values = config_of(directory, "long", grpo={}).to_dict()
    values["data"] |= {"max_length": 8, "on_too_long": "drop"}
    prepared = prepare(TrainConfig.from_dict(values))
    report: Any = prepared.data.train.report
    assert 0 < report.num_dropped < 22 == report.num_rows
    assert report.longest <= 8 + 4
    # The planner counts every answer as a row of its own.
    assert prepared.batch.rows == 3 * 8
    assert prepared.batch.labels == 3 * 8 * 4
    values["data"]["on_too_long"] = "error"
    with pytest.raises(lk.LorakitError, match="longer than max_length"):
        prepare(TrainConfig.from_dict(values))
