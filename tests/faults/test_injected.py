"""Killed at any moment, or refused by the disk at any operation: what has a final name is whole.

The default run takes a few places of each kind, `-m slow` up to 200.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
import tiny_runs
from fault_runs import HOWS, Server, same, strikes, tensors
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_base_model
from lorakit.train.checkpoints import CheckpointStore

_SLOW = pytest.mark.slow
# What takes a second each time: one way by default.
KILLS = ["kill", *(pytest.param(how, marks=_SLOW) for how in HOWS[1:])]
_EFFORTS = [pytest.param(2, id="few"), pytest.param(200, id="many", marks=_SLOW)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.process.communicate()


@pytest.fixture(scope="module")
def adapters(server: Server) -> tuple[Path, Path, Path]:
    """A model's directory and two of its adapters."""
    model = tiny_models.build("llama")
    model.save_pretrained(server.directory / "model")
    found: list[Path] = []
    for seed in (1, 2):
        base = load_base_model(str(server.directory / "model"))
        attach_learned(base, LoraSpec(r=3, alpha=7.5), seed=seed)
        save_adapter(base, server.directory / f"adapter{seed}")
        found.append(server.directory / f"adapter{seed}")
    return server.directory / "model", found[0], found[1]


@pytest.mark.parametrize("effort", _EFFORTS)
@pytest.mark.parametrize("how", HOWS)
def test_saving_over_an_adapter(
    server: Server, adapters: tuple[Path, Path, Path], how: str, effort: int
) -> None:
    _, old, new = adapters
    place = server.directory / "saving"
    output = place / "adapter"
    order = {"work": "save", "source": str(new), "output": str(output)}

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, output)

    prepare()
    for at in strikes(server, how, effort, **order):
        prepare()
        code = server.run(at, how, **order)
        if output.exists():
            kept = tensors(output)
            Adapter.load(output)
            assert same(kept, tensors(new)) or same(kept, tensors(old))
        if code != 137:
            assert output.exists()
            assert code == 0 or same(tensors(output), tensors(old))
        assert server.run(0, "redo", **order) == 0
        assert same(tensors(output), tensors(new))


@pytest.mark.parametrize("how", HOWS)
def test_a_record_is_the_old_one_or_the_new_one(server: Server, how: str) -> None:
    output = server.directory / "records" / "run.json"
    output.parent.mkdir(exist_ok=True)
    order = {"work": "record", "output": str(output)}
    for at in strikes(server, how, 20, **order):
        output.write_text('{"old": true}')
        server.run(at, how, **order)
        assert json.loads(output.read_text()).keys() in ({"old"}, {"new", "filler"})


@pytest.mark.parametrize("effort", [pytest.param(1, id="few"), _EFFORTS[1]])
@pytest.mark.parametrize("how", KILLS)
def test_merging(server: Server, adapters: tuple[Path, Path, Path], how: str, effort: int) -> None:
    model, adapter, _ = adapters
    place = server.directory / "merging"
    output = place / "merged"
    named = {"adapter": str(adapter), "base": str(model)}
    order = {"work": "merge", **named, "output": str(output)}

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()

    prepare()
    struck = strikes(server, how, effort, **order)
    whole = load_file(output / "model.safetensors")
    for at in struck:
        prepare()
        code = server.run(at, how, **order)
        assert (code == 0) <= output.exists()
        if output.exists():
            assert same(load_file(output / "model.safetensors"), whole)
            assert json.loads((output / "merge.json").read_text())
            shutil.rmtree(output)
        elif code != 137:
            # A directory that became read-only keeps what was begun, under a temporary name.
            left = [file.name for file in place.iterdir()]
            assert all(how == "EACCES" and name.endswith(".partial") for name in left), left
        assert server.run(0, "redo", **order) == 0
        assert same(load_file(output / "model.safetensors"), whole)


@pytest.mark.parametrize("effort", [pytest.param(1, id="few"), _EFFORTS[1]])
@pytest.mark.parametrize("how", KILLS)
def test_training_goes_on(server: Server, how: str, effort: int) -> None:
    source = server.directory / "rows"
    if not source.exists():
        source.mkdir()
        tiny_runs.write_all(source)
    options = {"epochs": None, "max_steps": 3, "save_every": 1, "eval_every": 2}
    config = tiny_runs.values(source, "unused", **options, keep_checkpoints=1)
    place = server.directory / "training"
    output = place / "run"
    order = {"work": "train", "config": config, "output": str(output), "resume": False}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    struck = strikes(server, how, effort, **order)
    whole = tensors(output / "adapter")
    for at in struck:
        shutil.rmtree(place)
        place.mkdir()
        server.run(at, how, **order)
        store = CheckpointStore(output / "checkpoints", keep=1)
        assert [
            store.read(step) for step in store.steps() if isinstance(store.read(step), str)
        ] == []
        if (output / "run.json").exists():
            assert json.loads((output / "run.json").read_text())
        if (output / "adapter").exists():
            Adapter.load(output / "adapter")
        resume = (output / "config.yaml").is_file()
        assert server.run(0, "redo", **{**order, "resume": resume}) == 0
        assert same(tensors(output / "adapter"), whole)
        assert json.loads((output / "run.json").read_text())["kind"] == "train"


@pytest.fixture(scope="module")
def together(server: Server) -> dict[str, dict[str, Any]]:
    """Orders of runs that are trained together: a sweep, and cells of a comparison."""
    source = server.directory / "shared"
    source.mkdir()
    tiny_runs.write_all(source)
    options = {"epochs": None, "max_steps": 4, "save_every": 1, "eval_every": 2}
    one = tiny_runs.values(source, "unused", **options, gradient_accumulation=1)
    one["lora"]["dropout"] = 0.0
    other = {**one, "train": {**one["train"], "lr": 0.03}}
    halved = {key: value for key, value in one.items() if key != "output"}
    halved["train"] = {key: value for key, value in one["train"].items() if key != "epochs"}
    grid = {"lr": [1e-3, 3e-2], "lora.r": [2, 4]}
    halved["sweep"] = {"grid": grid, "halving": {"every": 2}, "together": 3}
    return {
        "sweep": {"work": "sweep", "config": halved},
        "cells": {"work": "beside", "configs": {"one": one, "other": other}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("work", ["sweep", "cells"])
def test_runs_trained_together_go_on(
    server: Server, together: dict[str, dict[str, Any]], work: str, how: str
) -> None:
    place = server.directory / "together"
    output = place / work
    order = {**together[work], "output": str(output)}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    struck = strikes(server, how, 40, **order)
    whole = _runs_of(output)
    assert len(whole) == (4 if work == "sweep" else 2)
    for at in struck:
        shutil.rmtree(place)
        place.mkdir()
        server.run(at, how, **order)
        for file in output.rglob("*.json"):
            # Nothing half-written, wherever it stopped.
            assert ".partial" in str(file) or json.loads(file.read_text())
        assert server.run(0, "redo", **order) == 0, (at, server.stderr.read_text())
        found = _runs_of(output)
        assert found.keys() == whole.keys()
        for name, (steps, values) in found.items():
            assert steps == whole[name][0]
            for key, value in values.items():
                torch.testing.assert_close(value, whole[name][1][key], rtol=0, atol=1e-5)


def _runs_of(output: Path) -> dict[str, tuple[list[int], dict[str, torch.Tensor]]]:
    """The steps in its metrics and what it learned, of every run that is finished."""
    found: dict[str, tuple[list[int], dict[str, torch.Tensor]]] = {}
    for record in sorted(output.rglob("run.json")):
        lines = (record.parent / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        found[record.parent.name] = steps, tensors(record.parent / "adapter")
    return found
