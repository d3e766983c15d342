"""What is refused, and what is said, before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import tiny_models
import tiny_runs
from lorakit.errors import ConfigError, DataError, ModelError, TargetError
from lorakit.train.config import TrainConfig
from lorakit.train.prepare import prepare
from lorakit.train.run import train


@pytest.fixture
def directory(tmp_path):
    return tiny_runs.write_all(tmp_path)


@pytest.fixture
def encoder(directory):
    """The directory's model is an encoder with its tokenizer, but without an EOS."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    BertModel(config).save_pretrained(directory / "model")
    settings = directory / "model" / "tokenizer_config.json"
    settings.write_text(re.sub(r'"eos_token": "</s>"', '"eos_token": null', settings.read_text()))
    return directory


def test_an_encoder_without_a_head_is_refused_first_and_nothing_is_left(encoder):
    with pytest.raises(ModelError, match="no language-modelling head") as caught:
        train(tiny_runs.config(encoder), say=print)
    assert "BertModel" in (caught.value.where or "")
    assert caught.value.exit_code == 2
    assert not (encoder / "run").exists()


@pytest.mark.parametrize("task", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("sees_all", [tiny_models.t5, tiny_models.masked_lm])
def test_a_model_that_reads_the_answer_it_should_predict_is_refused(directory, task, sees_all):
    sees_all(70).save_pretrained(directory / "model")
    values = tiny_runs.values(directory) | {"task": task}
    if task == "grpo":
        values["grpo"] = {"reward": "exact_match"}
    with pytest.raises(ModelError, match="reads what it should predict") as caught:
        prepare(TrainConfig.from_dict(values))
    assert caught.value.exit_code == 2


def test_one_file_for_training_and_validation_is_refused(directory):
    values = tiny_runs.values(directory)
    values["data"]["validation"] = values["data"]["train"]
    with pytest.raises(ConfigError, match="the validation rows are the training rows"):
        prepare(TrainConfig.from_dict(values))


@pytest.mark.parametrize(
    ("lora", "kind", "where"),
    [
        ({"targets": "q_porj"}, TargetError, "lora.targets"),
    ],
)
def test_what_the_plan_refuses_is_named_as_in_the_config(directory, lora, kind, where):
    values = tiny_runs.values(directory)
    config = TrainConfig.from_dict({**values, "lora": {**values["lora"], **lora}})
    with pytest.raises(kind) as caught:
        prepare(config)
    assert (caught.value.where or "").startswith(where)


def test_the_memory_of_a_tiny_run_is_not_zero(directory):
    config = tiny_runs.config(directory)
    prepared = prepare(config)
    line = next(line for line in prepared.lines(config) if line.startswith("memory"))
    assert not re.search(r"(?<![\d.])0(\.0+)? [kMG]?B", line)
    assert "kB" in line
    num_params, num_base = prepared.plan.num_trainable, prepared.num_base_params
    share = f"{100 * num_params / (num_base + num_params):.1f} % of all"
    assert any(share in line for line in prepared.lines(config))


def test_one_process_of_a_launcher_trains(directory, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = tiny_runs.config(directory)
    options = dataclasses.replace(config.train, epochs=None, max_steps=1, warmup_steps=0)
    result = train(dataclasses.replace(config, train=options), say=lambda line: None)
    assert result.record["steps"]["done"] == 1


def test_what_tokenising_found_is_said_of_training_and_validation_rows(directory):
    values = tiny_runs.values(directory)
    values["data"] = {**values["data"], "max_length": 12, "on_too_long": "drop"}
    config = TrainConfig.from_dict(values)
    prepared = prepare(config)
    said = [line for line in prepared.lines(config) if "longer than max_length" in line]
    train, held = prepared.data.train, prepared.data.validation
    assert train.report.num_dropped
    assert held.report.num_dropped
    assert said == [
        f"note: {train.report.num_dropped} examples longer than max_length are left out",
        f"note: validation: {held.report.num_dropped} examples longer than max_length are left out",
    ]


def test_a_warmup_that_outlasts_the_run_is_said(directory):
    for num_steps in (2, 3):
        config = tiny_runs.config(directory, epochs=None, max_steps=num_steps, warmup_steps=2)
        said = any("the rate never reaches" in line for line in prepare(config).lines(config))
        assert said == (num_steps == 2)


@pytest.mark.parametrize("task", ["sft", "dpo", "classify"])
def test_a_token_without_an_embedding_is_refused(directory, task):
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory / "model")
    values = tiny_runs.values(directory) | {"task": task}
    values["data"]["validation"] = None
    rows = [{"prompt": "w1", "chosen": f"w2 {new}", "rejected": "w3"} for new in ("w4", "<new>")]
    if task == "classify":
        rows = [{"text": f"w2 {new}", "label": new} for new in ("w4", "<new>")]
    elif task == "sft":
        rows = [{"prompt": "w1", "completion": f"w2 {new}"} for new in ("w4", "<new>")]
    del values["train"]["eval_every"]

    def prepared(some):
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        return prepare(TrainConfig.from_dict(values))

    if task != "classify":
        prepared(rows[:1])
    with pytest.raises(DataError, match="no embedding for") as caught:
        prepared(rows)
    assert "'<new>', id 70" in caught.value.found
