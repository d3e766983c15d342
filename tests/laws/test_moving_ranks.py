"""Ranks that move while the adapter learns: what runs is what is saved, within the budget."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_runs
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attachments import adapted_layers
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import ConfigError, SpecError
from lorakit.methods.lora import LoraMethod
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

BUDGET = 3000


def _values(directory, output="run", *, adalora=None, lora=None, **train_options):
    values = tiny_runs.values(directory, output, **{"save_every": 3, **train_options})
    values["lora"] = {
        "r": "auto",
        "budget": BUDGET,
        "ranks": "adalora",
        "targets": "all-linear",
        "alpha": 6,
        **(lora or {}),
    }
    values["adalora"] = {"every": 2, **(adalora or {})}
    return values


def _quiet(_):
    pass


def _ids():
    return torch.tensor([[1, 9, 12, 30, 41, 22], [1, 40, 8, 8, 19, 60]])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adalora")
    tiny_runs.write_all(directory)
    result = train(TrainConfig.from_dict(_values(directory)), say=_quiet)
    return directory, result


def _learned(model, spec, start=1.5):
    """An AdaLoRA update in the middle of its way: values learned, some directions cut off."""
    torch.manual_seed(5)
    method = LoraMethod(spec, moving_start=start)
    method.attach(model)
    for place, layer in enumerate(adapted_layers(model)):
        for update in layer.branch_of("default").updates():
            with torch.no_grad():
                update.singular.normal_()
                update.singular[place % 2 :: 3] = 0.0
                update.lora_A.add_(torch.randn_like(update.lora_A), alpha=0.1)
    return method


def test_the_saved_adapter_computes_what_the_trained_one_does(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_runs.write_model(tmp_path / "model")).eval()
    before = base(_ids()).logits
    spec = LoraSpec(r="auto", budget=BUDGET, ranks="adalora", targets="all-linear", alpha=6)
    method = _learned(base, spec)
    with torch.no_grad():
        live = base(_ids()).logits
    assert (live - before).abs().max() > 1e-3
    with torch.enable_grad():
        assert torch.allclose(base(_ids()).logits, live, atol=1e-6)
    method.save(base, tmp_path / "adapter", {})
    ranks = {name: f.r for name, f in Adapter.load(tmp_path / "adapter").factors.items()}
    assert len(set(ranks.values())) > 1
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    bind_adapter(fresh, Adapter.load(tmp_path / "adapter"), "again")
    with torch.no_grad():
        # The directions that were cut off are not in the sums any more: as many roundings fewer.
        assert torch.allclose(fresh(_ids()).logits, live, rtol=1e-5, atol=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(theirs(_ids()).logits, live, atol=1e-5)
    merge(base, "default")
    with torch.no_grad():
        assert torch.allclose(base(_ids()).logits, live, atol=1e-5)


def test_a_run_ends_within_its_budget_and_begins_beyond_it(ran):
    _, result = ran
    adapter = Adapter.load(result.adapter)
    found = {name: factors.r for name, factors in adapter.factors.items()}
    dearest = max(sum(f.A.shape[1:]) + f.B.shape[0] for f in adapter.factors.values())
    assert BUDGET - dearest < adapter.num_params() <= BUDGET
    assert len(set(found.values())) > 1
    assert result.record["adapter"]["ranks"] == found
    assert result.record["adapter"]["trainable_params"] > BUDGET
    assert len({round(factors.scaling, 6) for factors in adapter.factors.values()}) == 1
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["peft_type"] == "LORA"
    lines = [json.loads(n) for n in (result.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    # 12 steps, settled from step 8 on: what came before is beyond the budget, and cannot be best.
    assert result.record["metrics"]["best_step"] >= 8


def test_a_run_that_is_resumed_ends_as_one_that_was_not(ran, tmp_path):
    directory, whole = ran
    tiny_runs.write_all(tmp_path)
    values = _values(directory, adalora={}) | {"output": str(tmp_path / "again")}
    values["train"]["keep_checkpoints"] = 9
    train(TrainConfig.from_dict(values), say=_quiet)
    for step in (6, 12):  # Step 3 is before the first cut, step 6 between two, step 9 settled.
        for path in (tmp_path / "again" / "checkpoints").glob(f"step-*{step:02d}"):
            shutil.rmtree(path)
    for path in (tmp_path / "again" / "checkpoints").glob("step-*09"):
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "again" / "adapter")
    again = train(TrainConfig.from_dict(values), resume=True, say=_quiet)
    first, second = Adapter.load(whole.adapter), Adapter.load(again.adapter)
    assert first.factors.keys() == second.factors.keys()
    for name, factors in first.factors.items():
        assert torch.equal(factors.A, second.factors[name].A), name
        assert torch.equal(factors.B, second.factors[name].B), name


def test_a_start_is_the_base_and_orthonormal(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_runs.write_model(tmp_path / "model")).eval()
    before = base(_ids()).logits
    spec = LoraSpec(r="auto", budget=BUDGET, ranks="adalora", targets="all-linear", alpha=6)
    report = LoraMethod(spec).attach(base)
    assert torch.equal(base(_ids()).logits, before)
    state = {n: p for n, p in base.named_parameters() if p.requires_grad}
    assert report.num_trainable == sum(p.numel() for p in state.values())
    for name, value in state.items():
        if name.endswith("lora_A"):
            assert torch.allclose(value @ value.T, torch.eye(len(value)), atol=1e-5)
    adapter = adapter_from_model(base)
    assert {f.r for f in adapter.factors.values()} == {1}
    assert not any(f.A.any() for f in adapter.factors.values())
    # With every direction in use the request that is saved still says what the factors are.
    for name, value in state.items():
        if name.endswith("singular"):
            torch.nn.init.ones_(value)
    whole = adapter_from_model(base)
    assert {f.r for f in whole.factors.values()} == {whole.spec.fixed_r()}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lora": {"update": "dora"}}, SpecError, "start of its own"),
        ({"lora": {"init": "pissa"}}, SpecError, "start of its own"),
        ({"lora": {"budget": 300}}, SpecError, "does not pay for rank 1"),
        ({"lora": {"targets": ["embed_tokens"]}}, SpecError, "linear layers only"),
        ({"lora": {"ranks": "uniform"}}, ConfigError, "section adalora"),
        ({"adalora": {"start": 0.5}}, ConfigError, "adalora.start"),
        ({"adalora": {"warmup": 0.6, "final": 0.5}}, ConfigError, "less than 1 together"),
        ({"adalora": {"betas": [0.85, 1.0]}}, ConfigError, "adalora.betas"),
        ({"adalora": {"speed": 3}}, ConfigError, "speed"),
        ({"lora_plus_ratio": 16.0}, ConfigError, "lora_plus_ratio"),
        ({"max_minutes": 1.0}, ConfigError, "max_minutes"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    changes, error, match, tmp_path
):
    tiny_runs.write_all(tmp_path)
    with pytest.raises(error, match=match):
        train(TrainConfig.from_dict(_values(tmp_path, **changes)), say=_quiet)
    assert not (tmp_path / "run").exists()
