"""Runs whose adapter is DoRA or does not start at zero: trained, resumed, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
import tiny_runs
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import DataError
from lorakit.formats.peft import load_adapter, save_adapter
from lorakit.merging.run import MergeRequest, merge_to_disk
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

_OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "dora": {"update": "dora"},
    "eva": {"init": "eva", "r": 2},
    "lora_ga-dora": {"init": "lora_ga", "r": 2, "update": "dora"},
}


def _config(directory: Path, output: str, lora: dict[str, Any], **changes: Any) -> TrainConfig:
    values = tiny_runs.values(directory, output, **{"epochs": 2, **changes})
    return TrainConfig.from_dict({**values, "lora": {**values["lora"], **lora}})


@pytest.mark.parametrize(
    "lora",
    [
        # The one that has everything in it each time, the others in the slow run.
        pytest.param(lora, id=name, marks=[] if name == "lora_ga-dora" else pytest.mark.slow)
        for name, lora in _OPTIONS.items()
    ],
)
def test_a_run_in_two_sessions_is_the_run_in_one(tmp_path: Path, lora: dict[str, Any]) -> None:
    directory = tiny_runs.write_all(tmp_path)
    said: list[str] = []
    whole = train(_config(directory, "whole", lora), say=said.append)
    looked = [line for line in said if "has looked at 8 batches" in line]
    assert len(looked) == (1 if lora.get("init") in ("eva", "lora_ga") else 0)
    # The constant schedule does not depend on where the first session meant to end.
    one = {"schedule": "constant", "max_steps": 8, "epochs": None}
    train(_config(directory, "one", lora, **one), say=lambda _: None)
    train(_config(directory, "two", lora, **{**one, "max_steps": 4}), say=lambda _: None)
    train(_config(directory, "two", lora, **one), resume=True, say=lambda _: None)
    tensors = [
        load_file(directory / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert [k for k, v in tensors[0].items() if not v.equal(tensors[1][k])] == []
    _binds_anywhere(directory, whole.adapter, lora)


def _binds_anywhere(directory: Path, saved: Path, lora: dict[str, Any]) -> None:
    adapter = Adapter.load(saved)
    doubled = lora.get("init") in ("pissa", "lora_ga")
    assert adapter.spec.r == lora.get("r", 4) * (2 if doubled else 1)
    if doubled:
        assert adapter.passport["trained_as"]["init"] == lora["init"]
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    given = {"input_ids": torch.randint(3, model.config.vocab_size, (3, 7))}
    before = tiny_models.outputs(model, given)
    load_adapter(model, saved)
    live = tiny_models.outputs(model, given)
    assert (live - before).abs().max() > 1e-3
    output = directory / "merged"
    request = MergeRequest(adapter=saved, output=output, base=str(directory / "model"))
    certificate = merge_to_disk(request)
    assert certificate["max_abs_logit_error"] <= certificate["tolerance"]
    merged = AutoModelForCausalLM.from_pretrained(output).eval()
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-4, atol=1e-4)


def test_too_few_batches_stop_the_run_before_it_writes(tmp_path: Path) -> None:
    directory = tiny_runs.write_all(tmp_path)
    config = _config(
        directory,
        "run",
        {"init": "eva", "r": 32, "targets": "q_proj"},
        batch_size=1,
        init_batches=1,
    )
    with pytest.raises(DataError, match="says too little") as caught:
        train(config, say=lambda _: None)
    assert caught.value.exit_code == 2
    assert not (directory / "run").exists()


@pytest.mark.real
@pytest.mark.slow
def test_dora_on_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    import warnings

    import peft

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    ids = torch.randint(100, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = tiny_models.outputs(model, given)
    attach(model, LoraSpec(r=4, alpha=10, targets="attention", update="dora"))
    assert tiny_models.outputs(model, given).equal(before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**given, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    live = tiny_models.outputs(model, given)
    assert (live - before).abs().max() > 0.1
    save_adapter(model, tmp_path / "dora")
    del model, optimizer
    base = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "dora")).eval()
    error = (tiny_models.outputs(theirs, given) - live).abs().max()
    assert error <= 1e-5 * live.abs().max()
    del theirs, base
    request = MergeRequest(
        adapter=tmp_path / "dora", output=tmp_path / "merged", base=str(smollm2_path)
    )
    certificate = merge_to_disk(request)
    assert certificate["max_abs_logit_error"] <= certificate["tolerance"]
    assert certificate["survival"] > 0.5
