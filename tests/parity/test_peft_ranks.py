"""Ranks that chose themselves, and ranks that were cut down, are ordinary files to PEFT."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch

import tiny_models
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.data_ranks import choose_ranks
from lorakit.adapters.prune import prune_adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import load_adapter, save_adapter


def _in_peft(architecture, path):
    with warnings.catch_warnings():
        # PEFT warns of configurations that are missing beside models made in memory.
        warnings.simplefilter("ignore")
        base = tiny_models.build(architecture)
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize(("architecture", "how"), [("llama", "gradient"), ("gpt2", "eva")])
def test_peft_computes_the_same_with_mixed_and_pruned_ranks(architecture, how, scaling, tmp_path):
    model = tiny_models.build(architecture)
    given = tiny_models.inputs(model)
    spec = LoraSpec(
        r="auto", budget=4000, ranks=how, alpha=9.0, targets="all-linear", scaling=scaling
    )
    chosen = choose_ranks(model, spec, [{**given, "labels": given["input_ids"]}])
    attach_learned(model, chosen.spec)
    live = tiny_models.outputs(model, given)
    save_adapter(model, tmp_path / "auto")
    config = json.loads((tmp_path / "auto" / "adapter_config.json").read_text())
    assert {chosen.ranks[n] for n in config["rank_pattern"]} == set(config["rank_pattern"].values())
    assert config["rank_pattern"]
    theirs = tiny_models.outputs(_in_peft(architecture, tmp_path / "auto"), given)
    torch.testing.assert_close(theirs, live, rtol=1e-5, atol=1e-5)

    pruned = prune_adapter(Adapter.load(tmp_path / "auto"), energy=0.7)
    pruned.adapter.save(tmp_path / "pruned")
    ours = tiny_models.build(architecture)
    load_adapter(ours, tmp_path / "pruned")
    small = tiny_models.outputs(ours, given)
    assert not torch.allclose(small, live, atol=1e-3)
    theirs = tiny_models.outputs(_in_peft(architecture, tmp_path / "pruned"), given)
    torch.testing.assert_close(theirs, small, rtol=1e-5, atol=1e-5)
