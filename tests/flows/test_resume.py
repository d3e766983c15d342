"""A run that is killed anywhere goes on bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.errors import BaseMismatchError, ConfigError, DataError, LorakitWarning, OutputError
from lorakit.train.run import train
from lorakit.train.trainer import AdapterTrainer

KILLED_RUN = Path(__file__).with_name("killed_run.py")
LAST_STEP = 12


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, the rows, and an uninterrupted run under `whole`."""
    directory = tiny_runs.write_all(tmp_path_factory.mktemp("resume"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(tiny_runs.config(directory, output="whole"), say=lambda line: None)
    torch.set_num_threads(threads)
    return directory


class Forker:
    """The process of killed_run.py, which starts a process per run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = subprocess.Popen(
            [sys.executable, str(KILLED_RUN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, place: str, step: int, output: str) -> int:
        """Start a run; its process id."""
        order = {"place": place, "step": step, "output": output}
        paths = {"directory": str(self.directory), "stderr": str(self.stderr)}
        self.server.stdin.write(json.dumps({**order, **paths}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def exit_code(self) -> int:
        """Wait for the run that was started last."""
        return int(self.server.stdout.readline())

    @property
    def stderr(self) -> Path:
        return self.directory / "stderr.txt"


@pytest.fixture(scope="module")
def forker(whole: Path):
    forker = Forker(whole)
    yield forker
    forker.server.communicate()


def history(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_s", "eval_s")} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    name = f"checkpoints/step-{LAST_STEP:08d}"
    for file in ("trained.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / name / file).read_bytes() == (other / name / file).read_bytes()
    assert (one / "adapter/adapter_model.safetensors").read_bytes() == (
        other / "adapter/adapter_model.safetensors"
    ).read_bytes()
    for file in ("optimizer.pt", "scheduler.pt"):
        left = torch.load(one / name / file, weights_only=True)
        right = torch.load(other / name / file, weights_only=True)
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    states = [
        json.loads((run / name / "checkpoint.json").read_text())["state"] for run in (one, other)
    ]
    for state in states:
        del state["busy_s"], state["num_sessions"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("place", "step", "resumed_from"),
    [
        # Steps are counted from 0 inside a step and from 1 after it; 4 steps make an epoch,
        # validation after every third, a checkpoint after every second and every new best.
        ("second batch of a step", 5, 4),
        ("before the checkpoint", 6, 4),
        ("inside the checkpoint", 8, 6),
        ("after the checkpoint", 4, 4),
        ("after the checkpoint", 9, 9),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(whole, forker, place, step, resumed_from):
    output = f"{place.replace(' ', '-')}-{step}"
    forker.start(place, step, output)
    assert forker.exit_code() == -signal.SIGKILL, forker.stderr.read_text()
    said: list[str] = []
    result = train(tiny_runs.config(whole, output=output), resume=True, say=said.append)
    assert f"resuming from step {resumed_from} of {LAST_STEP}" in said
    assert_same_run(whole / output, whole / "whole")
    assert result.record["steps"]["sessions"] == 2
    assert not list((whole / output / "checkpoints").glob(".*"))


def test_a_kill_from_outside_at_any_moment(whole, forker):
    pid = forker.start("slow", 0, "outside")
    wait_for_lines(whole / "outside" / "metrics.jsonl", 5)
    os.kill(pid, signal.SIGKILL)
    assert forker.exit_code() == -signal.SIGKILL
    train(tiny_runs.config(whole, output="outside"), resume=True, say=lambda line: None)
    assert_same_run(whole / "outside", whole / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_says_how_to_go_on(whole, forker, number):
    output = number.name
    pid = forker.start("slow", 0, output)
    wait_for_lines(whole / output / "metrics.jsonl", 3)
    os.kill(pid, number)
    assert forker.exit_code() == 130
    said = forker.stderr.read_text()
    config_file = whole / output / "config.yaml"
    assert f"lorakit train {config_file} --resume" in said
    stopped = len([line for line in history(whole / output) if "loss" in line])
    assert f"stopped after step {stopped} of {LAST_STEP}" in said
    assert not (whole / output / "run.json").exists()
    again = tiny_runs.TrainConfig.from_yaml(config_file)
    train(again, resume=True, say=lambda line: None)
    assert_same_run(whole / output, whole / "whole")


def wait_for_lines(metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stopped(whole, tmp_path, monkeypatch) -> Path:
    """A run in this process that broke off after step 8 had begun; its directory."""

    class BrokenOffError(Exception):
        pass

    step_of = AdapterTrainer.training_step

    def breaks(self, *args):
        if self.state.global_step == 8:
            raise BrokenOffError
        return step_of(self, *args)

    tiny_runs.write_rows(tmp_path / "train.jsonl", 22)
    tiny_runs.write_rows(tmp_path / "validation.jsonl", 7, seed=1)
    (tmp_path / "model").symlink_to(whole / "model")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", breaks)
        with pytest.raises(BrokenOffError):
            train(tiny_runs.config(tmp_path), say=lambda line: None)
    return tmp_path


def resume(directory: Path, **values: Any):
    return train(tiny_runs.config(directory, **values), resume=True, say=lambda line: None)


@pytest.mark.parametrize("damage", ["truncated", "changed", "manifest", "missing"])
def test_a_damaged_checkpoint_is_passed_over(stopped, whole, damage):
    newest = stopped / "run/checkpoints/step-00000008"
    optimizer = newest / "optimizer.pt"
    data = bytearray(optimizer.read_bytes())
    if damage == "truncated":
        optimizer.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[len(data) // 2] ^= 1
        optimizer.write_bytes(data)
    elif damage == "manifest":
        (newest / "checkpoint.json").write_text('{"step": 8')
    else:
        (newest / "rng_state.pth").unlink()
    with pytest.warns(LorakitWarning, match="passed over the damaged checkpoint .*step-00000008"):
        resume(stopped)
    assert_same_run(stopped / "run", whole / "whole")


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    tiny_runs.write_rows(tmp_path / "train.jsonl", 22)
    tiny_runs.write_rows(tmp_path / "validation.jsonl", 7, seed=1)
    (tmp_path / "model").symlink_to(whole / "model")
    first = train(tiny_runs.config(tmp_path, epochs=None, max_steps=6), say=lambda line: None)
    before = load_file(first.adapter / "adapter_model.safetensors")
    again = resume(tmp_path, epochs=None, max_steps=6)
    after = load_file(again.adapter / "adapter_model.safetensors")
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert again.record["steps"]["done"] == 6
    # Longer is allowed; the linear schedule then bends, which is said.
    with pytest.warns(LorakitWarning, match="schedule is laid over the new length"):
        longer = resume(tmp_path, epochs=None, max_steps=8)
    assert longer.record["steps"]["done"] == 8


def test_resume_with_another_config_names_the_keys(stopped):
    with pytest.raises(ConfigError) as caught:
        resume(stopped, lr=0.02, save_every=3)
    assert caught.value.where == "train.lr"


def test_resume_with_other_rows(stopped):
    tiny_runs.write_rows(stopped / "train.jsonl", 22, seed=5)
    with pytest.raises(DataError, match="train rows are not the ones"):
        resume(stopped)


def test_resume_with_another_base(stopped):
    (stopped / "model").unlink()
    tiny_runs.write_model(stopped / "model", seed=12)
    with pytest.raises(BaseMismatchError, match="base is not the one"):
        resume(stopped)


def test_resume_without_a_checkpoint(whole, tmp_path):
    directory = tmp_path / "none"
    config = tiny_runs.config(whole, output=str(directory))
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        train(config, resume=True)
    assert not directory.exists()


def test_resume_of_a_run_killed_before_its_first_checkpoint(whole, tmp_path):
    directory = tmp_path / "begun"
    config = tiny_runs.config(whole, output=str(directory))
    directory.mkdir()
    (directory / ".lock").write_text("")
    (directory / "config.yaml").write_text(config.to_yaml())
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    with pytest.raises(ConfigError, match="not the one this run was started with"):
        train(tiny_runs.config(whole, output=str(directory), lr=1e-5), resume=True)
    said: list[str] = []
    torch.set_num_threads(1)
    train(config, resume=True, say=said.append)
    assert any("beginning at the first step" in line for line in said)
    adapter = Path("adapter/adapter_model.safetensors")
    assert (directory / adapter).read_bytes() == (whole / "whole" / adapter).read_bytes()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == len(
        (whole / "whole" / "metrics.jsonl").read_text().splitlines()
    )
    # What is there now is no longer a run that was only begun.
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        train(config, resume=True)


def test_the_best_checkpoint_that_is_gone_is_said(stopped):
    for path in (stopped / "run/checkpoints").glob("step-00000006/*.pt"):
        path.write_bytes(b"")
    with pytest.warns(LorakitWarning, match="best checkpoint so far, step 6, is gone"):
        result = resume(stopped)
    assert result.record["metrics"]["best_step"] in (9, 12)
