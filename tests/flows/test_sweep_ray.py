"""The same sweep on a Ray cluster of two workers on this machine."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from lorakit.cli.main import main
from lorakit.train.yaml import dump

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]


def values(directory: Path, output: Path) -> dict[str, Any]:
    made = tiny_runs.values(directory, str(output), save_every=100)
    del made["train"]["epochs"], made["train"]["eval_every"]
    made["train"] |= {"max_steps": 4, "gradient_accumulation": 1}
    made["lora"]["dropout"] = 0.0
    grid = {"lora.r": [2, 4], "lr": [1e-3, 3e-2]}
    return {**made, "sweep": {"grid": grid, "halving": {"every": 2}, "together": 2}}


def on_ray(file: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "lorakit", "sweep", str(file), "--engine", "ray", "--workers", "2", "--json"]
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
    )


def test_two_workers_find_what_one_process_finds(tmp_path, capsys) -> None:
    directory = tiny_runs.write_all(tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    for output in (here, there):
        output.with_suffix(".yaml").write_text(dump(values(directory, output)))
    assert main(["sweep", str(here.with_suffix(".yaml")), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)

    done = on_ray(there.with_suffix(".yaml"))
    assert done.returncode == 0, done.stderr
    assert "ray: 2 workers" in done.stderr
    found = json.loads(done.stdout)
    assert found["best"] == expected["best"]
    assert found["engine"] == "ray"
    arms = {arm["name"]: arm for arm in found["arms"]}
    for arm in expected["arms"]:
        mine = arms[arm["name"]]
        assert (mine["steps"], mine["dropped_at"]) == (arm["steps"], arm["dropped_at"])
        assert mine["eval_loss"] == pytest.approx(arm["eval_loss"], rel=1e-4)
    assert (there / "best" / "adapter_model.safetensors").is_file()
    assert not (there / ".stop").exists()

    # What is wrong in a worker is said here, and a finished sweep is not run again.
    before = (there / "sweep.json").read_text()
    made = values(directory, there)
    made["sweep"]["grid"] = {"lora.r": [2, 4], "lr": [1e-3, 3e-2], "train.max_steps": [3]}
    there.with_suffix(".yaml").write_text(dump(made))
    (directory / "validation.jsonl").unlink()
    assert on_ray(there.with_suffix(".yaml")).returncode == 2
    assert (there / "sweep.json").read_text() == before
