"""Training with ranks that choose themselves: planned, chosen, saved, resumed."""

from __future__ import annotations

import json

import pytest

import tiny_runs
from lorakit.adapters.adapter import Adapter
from lorakit.errors import ConfigError, LorakitWarning, SpecError
from lorakit.train.config import TrainConfig
from lorakit.train.run import train


def _config(directory, output, **changes):
    values = tiny_runs.values(directory, output, epochs=1, **changes.pop("train", {}))
    values["lora"] = {"r": "auto", "budget": "3k", "targets": "all-linear", "alpha": 6, **changes}
    return TrainConfig.from_dict(values)


@pytest.mark.parametrize("ranks", ["uniform", "eva", "gradient"])
def test_a_run_spends_its_budget_and_saves_what_every_tool_reads(ranks, tmp_path):
    tiny_runs.write_all(tmp_path)
    said: list[str] = []
    result = train(_config(tmp_path, "run", ranks=ranks), say=said.append)
    adapter = Adapter.load(result.adapter)
    found = {name: factors.r for name, factors in adapter.factors.items()}
    assert adapter.num_params() <= 3000
    assert result.record["adapter"]["trainable_params"] == adapter.num_params()
    assert len({factors.scaling for factors in adapter.factors.values()}) == 1
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    if ranks == "uniform":
        assert len(set(found.values())) == 1
        assert not config["rank_pattern"]
    else:
        assert len(set(found.values())) > 1
        assert any(f"lora.ranks: {ranks} has looked at 8 batches" in line for line in said)
    assert result.record["adapter"]["ranks"] == found


def test_a_resumed_run_keeps_the_ranks_it_was_begun_with(tmp_path):
    tiny_runs.write_all(tmp_path)
    first = train(_config(tmp_path, "run", ranks="gradient"), say=lambda _: None)
    before = {name: f.r for name, f in Adapter.load(first.adapter).factors.items()}
    longer = tiny_runs.values(tmp_path, "run", epochs=2)
    longer["lora"] = _config(tmp_path, "run", ranks="gradient").to_dict()["lora"]
    with pytest.warns(LorakitWarning, match="the run now has"):
        again = train(TrainConfig.from_dict(longer), resume=True, say=lambda _: None)
    after = {name: f.r for name, f in Adapter.load(again.adapter).factors.items()}
    assert after == before
    assert again.record["steps"]["done"] > first.record["steps"]["done"]


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    tiny_runs.write_all(tmp_path)
    with pytest.raises(SpecError, match="does not pay for rank 1"):
        train(_config(tmp_path, "run", budget=300), say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_data_that_compares_answers_chooses_no_ranks(tmp_path):
    values = _config(tmp_path, "run", ranks="gradient").to_dict()
    with pytest.raises(ConfigError, match="ranks and starts taken from data"):
        TrainConfig.from_dict({**values, "task": "dpo"})
