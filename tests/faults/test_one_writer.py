"""Two runs into one directory, and a clock that jumps."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.errors import OutputError
from lorakit.files import only_writer, require_free
from lorakit.train.config import TrainConfig
from lorakit.train.run import train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_all(tmp_path_factory.mktemp("alone"))


def _config(directory: Path, output: str, steps: int = 2) -> TrainConfig:
    options = {"epochs": None, "max_steps": steps, "save_every": 1, "schedule": "constant"}
    return tiny_runs.config(directory, output, **options)


def test_a_second_run_into_the_same_directory_is_refused(directory: Path) -> None:
    train(_config(directory, "both"), say=lambda _line: None)
    before = sorted(file.name for file in (directory / "both").iterdir())
    assert ".lock" not in before
    with only_writer(directory / "both"):
        with pytest.raises(OutputError, match="another process writes"):
            train(_config(directory, "both", 4), resume=True, say=lambda _line: None)
        with (
            pytest.raises(OutputError, match="another process writes"),
            only_writer(directory / "both"),
        ):
            pass
    assert sorted(file.name for file in (directory / "both").iterdir()) == before
    train(_config(directory, "both", 4), resume=True, say=lambda _line: None)


def test_a_lock_that_a_killed_run_left_locks_nothing(directory: Path) -> None:
    train(_config(directory, "killed"), say=lambda _line: None)
    (directory / "killed" / ".lock").write_text("")
    train(_config(directory, "killed", 3), resume=True, say=lambda _line: None)


def test_a_run_killed_right_after_it_took_its_directory_starts_afresh(directory: Path) -> None:
    (directory / "taken").mkdir()
    (directory / "taken" / ".lock").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        require_free(directory / "taken")
    with only_writer(directory / "taken"), pytest.raises(OutputError, match="another process"):
        train(_config(directory, "taken"), say=lambda _line: None)
    (directory / "taken" / ".lock").write_text("")
    # Killed while it wrote its first file.
    (directory / "taken" / ".config.yaml.x1y2.partial").write_text("mod")
    (directory / "taken" / ".adapter.x1y2.partial").mkdir()
    train(_config(directory, "taken"), say=lambda _line: None)
    assert (directory / "taken" / "adapter").is_dir()
    assert not list((directory / "taken").glob(".*"))


def test_what_another_tool_left_is_no_leftover_of_ours(directory: Path) -> None:
    (directory / "theirs").mkdir()
    (directory / "theirs" / "model.partial").write_text("")
    with pytest.raises(OutputError, match="not empty") as caught:
        train(_config(directory, "theirs"), say=lambda _line: None)
    assert caught.value.found == "model.partial"


def test_a_clock_that_jumps_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    plain = train(_config(directory, "plain"), say=lambda _line: None)
    jumps = random.Random(1)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    jumped = train(_config(directory, "jumped"), say=lambda _line: None)
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (plain, jumped))
    assert all(one[name].equal(two[name]) for name in one)
    timing = jumped.record["timing"]
    assert all(0 <= seconds < 600 for seconds in timing.values())
