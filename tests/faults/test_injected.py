"""Killed, or refused by the disk, at every single file operation: nothing corrupt has a final name.

The default run takes a few places of each kind; `-m slow` all of saving and merging, and some
hundred of training.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
import tiny_runs
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_base_model
from lorakit.train.checkpoints import CheckpointStore

HOWS = ("kill", "ENOSPC", "EACCES")
_SLOW = pytest.mark.slow
# What takes a second each time: one way by default.
KILLS = ["kill", *(pytest.param(how, marks=_SLOW) for how in HOWS[1:])]
_EFFORTS = [pytest.param(2, id="few"), pytest.param(400, id="many", marks=_SLOW)]


class Server:
    """The process of fault_server.py."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stderr = directory / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, at: int, how: str, **order: Any) -> int:
        """Carry out an order; its exit code, 137 where it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        told = {"at": at, "how": how, "root": str(self.directory), "stderr": str(self.stderr)}
        self.process.stdin.write(json.dumps({**order, **told}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert code in (0, 2, 137), self.stderr.read_text()
        return code

    def count(self, **order: Any) -> int:
        """How many file operations it takes when nothing goes wrong."""
        assert self.run(0, "count", **order) == 0
        return int(self.stderr.read_text())


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


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def _places(total: int, effort: int) -> list[int]:
    """Every operation, or some of them."""
    if total <= effort:
        return list(range(1, total + 1))
    rng = random.Random(total)
    return sorted(rng.sample(range(1, total + 1), effort))


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
    for at in _places(server.count(**order), effort):
        prepare()
        code = server.run(at, how, **order)
        if output.exists():
            kept = _tensors(output)
            Adapter.load(output)
            assert _same(kept, _tensors(new)) or _same(kept, _tensors(old))
        if how != "kill":
            assert output.exists()
            assert code == 0 or _same(_tensors(output), _tensors(old))
        assert server.run(0, "redo", **order) == 0
        assert _same(_tensors(output), _tensors(new))


@pytest.mark.parametrize("how", HOWS)
def test_a_record_is_the_old_one_or_the_new_one(server: Server, how: str) -> None:
    output = server.directory / "records" / "run.json"
    output.parent.mkdir(exist_ok=True)
    order = {"work": "record", "output": str(output)}
    for at in _places(server.count(**order), 100):
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
    total = server.count(**order)
    whole = load_file(output / "model.safetensors")
    for at in _places(total, effort):
        prepare()
        code = server.run(at, how, **order)
        assert (code == 0) <= output.exists()
        if output.exists():
            assert _same(load_file(output / "model.safetensors"), whole)
            assert json.loads((output / "merge.json").read_text())
            shutil.rmtree(output)
        elif how != "kill":
            # A directory that became read-only keeps what was begun, under a temporary name.
            left = [file.name for file in place.iterdir()]
            assert all(how == "EACCES" and name.endswith(".partial") for name in left), left
        assert server.run(0, "redo", **order) == 0
        assert _same(load_file(output / "model.safetensors"), whole)


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
    total = server.count(**order)
    whole = _tensors(output / "adapter")
    for at in _places(total, effort):
        shutil.rmtree(place)
        place.mkdir()
        server.run(at, how, **order)
        store = CheckpointStore(output / "checkpoints", keep=1)
        assert [
            store.read(step) for step in store.steps() if isinstance(store.read(step), str)
        ] == []
        for name in ("run.json",):
            if (output / name).exists():
                assert json.loads((output / name).read_text())
        if (output / "adapter").exists():
            Adapter.load(output / "adapter")
        resume = bool(store.steps())
        if not resume:
            shutil.rmtree(output, ignore_errors=True)
        assert server.run(0, "redo", **{**order, "resume": resume}) == 0
        assert _same(_tensors(output / "adapter"), whole)
        assert json.loads((output / "run.json").read_text())["kind"] == "train"
