"""DPO's losses and steps are those of TRL's DPOTrainer on PEFT's LoRA."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import lorakit as lk
import tiny_runs
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

trl = pytest.importorskip("trl")

STEPS, LR, BETA, SEED = 4, 0.02, 0.3, 5
SPEC = {"r": 4, "alpha": 12, "targets": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_losses_and_learned_factors_are_trls(tmp_path: Path, loss: str) -> None:
    tiny_runs.write_model(tmp_path / "model")
    rows = _rows()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    ours = train(_config(tmp_path, loss, len(rows)), say=lambda _line: None)
    lines = (ours.directory / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    theirs, adapter = _with_trl(tmp_path, rows, loss)
    assert losses == pytest.approx(theirs, abs=2e-5)
    learned = load_file(ours.adapter / "adapter_model.safetensors")
    assert learned.keys() == adapter.keys()
    for name, tensor in learned.items():
        torch.testing.assert_close(tensor, adapter[name], rtol=2e-3, atol=2e-5)


def _rows() -> list[dict[str, str]]:
    rng = random.Random(1)
    return [
        {
            "prompt": " ".join(rng.choices(tiny_runs.WORDS, k=rng.randint(2, 8))),
            "chosen": " " + " ".join(rng.choices(tiny_runs.WORDS, k=rng.randint(1, 5))),
            "rejected": " " + " ".join(rng.choices(tiny_runs.WORDS, k=rng.randint(1, 5))),
        }
        for _ in range(6)
    ]


def _config(directory: Path, loss: str, num_rows: int) -> TrainConfig:
    # One batch is the whole data, so the order of the rows does not matter.
    return TrainConfig.from_dict(
        {
            "model": str(directory / "model"),
            "data": {"train": str(directory / "train.jsonl")},
            "task": "dpo",
            "preference": {"beta": BETA, "loss": loss},
            "lora": SPEC,
            "train": {
                "max_steps": STEPS,
                "batch_size": num_rows,
                "lr": LR,
                "schedule": "constant",
                "precision": "fp32",
            },
            "output": str(directory / "run"),
            "seed": SEED,
        }
    )


def _with_trl(
    directory: Path, rows: list[dict[str, str]], loss: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    model, tokenizer = lk.load_model(directory / "model", dtype="float32")
    set_seed(SEED)
    lk.attach(model, lk.LoraSpec.from_dict(SPEC), name="start")
    lk.save_adapter(model, directory / "start", name="start")
    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    policy = peft.PeftModel.from_pretrained(base, directory / "start", is_trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer: Any = trl.DPOTrainer(
            model=policy,
            args=trl.DPOConfig(
                output_dir=str(directory / "trl"),
                beta=BETA,
                loss_type=[loss],
                learning_rate=LR,
                lr_scheduler_type="constant",
                per_device_train_batch_size=len(rows),
                max_steps=STEPS,
                logging_steps=1,
                max_grad_norm=1.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        policy.save_pretrained(directory / "theirs")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, load_file(directory / "theirs" / "adapter_model.safetensors")
