"""A sweep through the command line: plan, halving, best, resume, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
import tiny_runs
from lorakit.cli.main import main
from lorakit.errors import LorakitWarning, MemoryPlanError
from lorakit.sweep.config import SweepConfig
from lorakit.sweep.plan import plan_sweep
from lorakit.sweep.run import sweep
from lorakit.train.interrupt import Interrupt, TrainingPaused
from lorakit.train.yaml import dump


def values(directory: Path, output: str = "sweep", **section: Any) -> dict[str, Any]:
    made = tiny_runs.values(directory, output, save_every=100)
    del made["train"]["epochs"], made["train"]["eval_every"]
    made["train"] |= {"max_steps": 5, "gradient_accumulation": 1}
    made["lora"]["dropout"] = 0.0
    grid = {"lora.r": [2, 4], "lr": [1e-3, 3e-2]}
    section = {"grid": grid, "halving": {"every": 2}, "together": 3, **section}
    return {**made, "sweep": section}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tiny_runs.write_all(tmp_path_factory.mktemp("sweep"))


def written(directory: Path, tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(dump({**values(directory), "output": str(tmp_path / "out"), **changes}))
    return file


def told(capsys) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_a_sweep_from_its_config_to_its_report(directory, tmp_path, capsys) -> None:
    file, out = written(directory, tmp_path), tmp_path / "out"
    assert main(["sweep", str(file), "--dry-run", "--json"]) == 0
    plan = told(capsys)
    assert plan["rungs"] == [2, 4]
    assert plan["num_steps"] == 4 * 2 + 2 * 2 + 1 * 1
    assert plan["arms"][0]["trainable_params"] * 2 == plan["arms"][2]["trainable_params"]
    assert not out.exists()

    assert main(["sweep", str(file), "--json"]) == 0
    found = told(capsys)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert sorted(arm["steps"] for arm in arms.values()) == [2, 2, 4, 5]
    assert sorted(str(arm["dropped_at"]) for arm in arms.values()) == ["2", "2", "4", "None"]
    at_two = {name: dict(arm["eval_curve"])[2] for name, arm in arms.items()}
    lasted = {name for name, arm in arms.items() if arm["steps"] > 2}
    assert lasted == set(sorted(at_two, key=at_two.__getitem__)[:2])

    best = arms[found["best"]]
    assert best["steps"] == 5
    # Rungs are not sessions: nothing was interrupted.
    records = [json.loads(path.read_text()) for path in (out / "arms").rglob("run.json")]
    assert {record["steps"]["sessions"] for record in records} == {1}
    kept = load_file(out / "best" / "adapter_model.safetensors")
    own = load_file(out / best["adapter"] / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], own[key]) for key in own)
    assert lk.Adapter.load(out / "best").spec.r == best["settings"]["lora.r"]
    page = (out / "report.html").read_text()
    assert "<h2>Arms</h2>" in page
    assert "One line per arm." in page
    assert "seeds of a method" not in page
    assert all(name in page for name in arms)
    assert not list((out / "arms").glob("*/checkpoints"))

    # Nothing is trained again, and the same is told.
    stamps = {path: path.stat().st_mtime_ns for path in (out / "arms").rglob("run.json")}
    assert main(["sweep", str(file), "--json"]) == 0
    assert [arm["eval_loss"] for arm in told(capsys)["arms"]] == [
        arm["eval_loss"] for arm in found["arms"]
    ]
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "arms").rglob("run.json")}

    # Another config in the same place is refused.
    assert main(["sweep", str(file), "train.batch_size=2"]) == 2
    assert "train.batch_size" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_as_if_nothing_had_happened(
    directory, tmp_path, monkeypatch, capsys
):
    made = {**values(directory), "output": str(tmp_path / "whole")}
    whole = sweep(SweepConfig.from_dict(made), say=lambda _: None)
    config = SweepConfig.from_dict({**made, "output": str(tmp_path / "cut")})
    asked = iter([False] * 5)
    with monkeypatch.context() as patch:
        # As a signal in the middle of the second rung would.
        patch.setattr(Interrupt, "requested", property(lambda _: next(asked, True)), raising=False)
        patch.setattr(Interrupt, "__init__", lambda self: setattr(self, "_previous", {}))
        with pytest.raises(TrainingPaused, match="saved"):
            sweep(config, say=lambda _: None)
    assert not (tmp_path / "cut" / "sweep.json").exists()
    total = plan_sweep(config).num_steps
    capsys.readouterr()
    again = sweep(config, say=lambda _: None)
    assert f"sweep: {total}/{total} " in capsys.readouterr().err
    assert again.document["best"] == whole.document["best"]
    for one, other in zip(whole.document["arms"], again.document["arms"], strict=True):
        assert one["eval_curve"] == other["eval_curve"]
        assert one["train_curve"] == other["train_curve"]


@pytest.mark.slow
@pytest.mark.parametrize("rung", [0, 1, 2])
def test_a_killed_sweep_ends_as_if_it_had_not_been(directory, tmp_path, rung) -> None:
    made = values(directory, halving={"every": 10})
    made["train"] |= {"max_steps": 40, "save_every": 3, "eval_every": 5}
    whole = sweep(
        SweepConfig.from_dict({**made, "output": str(tmp_path / "whole")}), say=lambda _: None
    )
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(dump({**made, "output": str(out)}))
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "sweep", str(file)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    # In the middle of a rung: an arm of it is that far, the sweep is not at its end.
    end = time.monotonic() + 120
    while max(map(_lines, out.glob("arms/*/metrics.jsonl")), default=0) < 5 + 12 * rung:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (out / "sweep.json").exists()
    again = sweep(SweepConfig.from_yaml(file), say=lambda _: None)
    assert again.document["best"] == whole.document["best"]
    for mine, theirs in zip(again.document["arms"], whole.document["arms"], strict=True):
        assert (mine["name"], mine["steps"]) == (theirs["name"], theirs["steps"])
        assert mine["dropped_at"] == theirs["dropped_at"]
        for curve in ("eval_curve", "train_curve"):
            for one, other in zip(mine[curve], theirs[curve], strict=True):
                assert one == pytest.approx(other, abs=1e-5)


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_a_kill_while_a_finished_arm_is_tidied_stops_nothing(directory, tmp_path) -> None:
    made = {**values(directory), "output": str(tmp_path / "out")}
    whole = sweep(SweepConfig.from_dict(made), say=lambda _: None)
    # Behind the record of an arm its checkpoints are removed, file by file.
    left = tmp_path / "out" / "arms" / whole.document["best"] / "checkpoints" / "step-00000005"
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half of")
    (tmp_path / "out" / "sweep.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorakitWarning)
        again = sweep(SweepConfig.from_dict(made), say=lambda _: None)
    assert again.document["arms"] == whole.document["arms"]
    assert not left.exists()


def test_an_arm_that_diverges_fails_alone(directory, tmp_path) -> None:
    grid = {"train.lr": [1e-3, 1e30]}
    made = values(directory, grid=grid, halving={}, together=None)
    made["train"] |= {"max_grad_norm": None, "max_steps": 5, "warmup_steps": 0}
    found = sweep(
        SweepConfig.from_dict({**made, "output": str(tmp_path / "out")}), say=lambda _: None
    )
    good, bad = found.document["arms"]
    assert good["steps"] == 5
    assert good["failed"] is None
    assert "not finite" in bad["failed"]
    assert found.document["best"] == good["name"]
    assert json.loads((tmp_path / "out" / "arms" / bad["name"] / "failed.json").read_text())["why"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": {"dropout": 0.1}}, ["lora.dropout", "its run alone"]),
        (
            {"method": "bitfit", "lora": {}, "sweep": {"grid": {"lr": [0.1]}}},
            ["method", "LoRA or DoRA"],
        ),
        ({"sweep": {"grid": {"model.dtype": ["bfloat16"]}}}, ["model.dtype", "one base"]),
        ({"sweep": {"grid": {"lora.rank": [4]}}}, ["lora.r"]),
        ({"sweep": {"grid": {"lora.r": [4, -1]}}}, ["arm r--1"]),
        ({"sweep": {"grid": {}}}, ["no arms"]),
        ({"sweep": {"random": {"n": 2}}}, ["random search"]),
        ({"sweep": {"random": {"n": 2, "ranges": {"lr": {"low": 2, "high": 1}}}}}, ["low < high"]),
        ({"sweep": {"grid": {"lr": [0.1, 0.2]}, "halving": {"every": 4, "keep": 1}}}, ["keep"]),
        (
            {
                "sweep": {
                    "grid": {"train.max_steps": [8, 9]},
                    "halving": {"every": 4},
                }
            },
            ["one length"],
        ),
        (
            {"sweep": {"grid": {"lr": [0.1, 0.2]}, "halving": {"every": 5}}},
            ["sweep.halving.every", "fewer than the 5 steps"],
        ),
        ({"sweep": {"arms": [{"name": "../up"}]}}, ["name of a directory"]),
        ({"data": {"train": "none.jsonl"}}, ["validation"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    directory, tmp_path, capsys, change, words
) -> None:
    file = written(directory, tmp_path, **change)
    assert main(["sweep", str(file)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "slurm"], "local or ray"),
        (["--workers", "2"], "--engine local --workers 2"),
        (["--engine", "ray", "--workers", "0"], "at least 1"),
    ],
)
def test_engines_that_there_are_not(directory, tmp_path, capsys, words, said) -> None:
    if "ray" in words and find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    assert main(["sweep", str(written(directory, tmp_path)), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_together_than_fit_is_refused(directory, tmp_path, monkeypatch) -> None:
    made = {**values(directory), "output": str(tmp_path / "out")}
    needed = plan_sweep(SweepConfig.from_dict(made)).memory.total_bytes
    monkeypatch.setattr("lorakit.train.prepare.free_memory_bytes", lambda _: needed - 1)
    with pytest.raises(MemoryPlanError, match="do not fit in memory"):
        sweep(SweepConfig.from_dict(made), say=lambda _: None)
    assert not (tmp_path / "out").exists()
    made["sweep"]["together"] = None
    assert plan_sweep(SweepConfig.from_dict(made)).together < 4
