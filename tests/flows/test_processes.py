"""A run of two processes (gloo, on the CPU) is that of one process with their rows together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

LAUNCHED_RUN = Path(__file__).with_name("launched_run.py")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAST_STEP = 9
# Its --cpu would start a single process; where there is no GPU these are on the CPU all the same.
ACCELERATE = (
    *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "-m", "lorakit"),
)


class Launcher:
    """The process of launched_run.py, which starts the processes of a run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = subprocess.Popen(
            [sys.executable, str(LAUNCHED_RUN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, num: int, values: dict[str, Any], **order: Any) -> list[int]:
        """The exit codes of the processes of a run."""
        order = {"num": num, "values": values, "stderr": str(self.directory / "said"), **order}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def said(self, rank: int) -> str:
        return Path(f"{self.directory / 'said'}.{rank}").read_text()


def values(directory: Path, output: str, rows: int, **train_keys: Any) -> dict[str, Any]:
    """9 steps: an epoch's 21 rows are 6 batches of 4, the last of a single row, 2 in a step."""
    made = tiny_runs.values(directory, output, batch_size=rows, **train_keys)
    # Each process would draw its own.
    made["lora"]["dropout"] = 0.0
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the rows, and the run of one process under `whole`."""
    made = tiny_runs.write_all(tmp_path_factory.mktemp("processes"))
    tiny_runs.write_rows(made / "train.jsonl", 21)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(TrainConfig.from_dict(values(made, "whole", 4)), say=lambda line: None)
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def launcher(directory: Path):
    launcher = Launcher(directory)
    yield launcher
    launcher.server.communicate()


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, whole: Path, rel: float = 2e-5, atol: float = 5e-5) -> None:
    ours, theirs = history(run), history(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.keys() == expected.keys()
        for key in mine.keys() - {"step_s", "eval_s"}:
            assert mine[key] == pytest.approx(expected[key], rel=rel, abs=1e-7), (mine, key)
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    wanted = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert max(value.abs().max() for value in wanted.values()) > 0.05
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize("env", [{}, FSDP2], ids=["whole base", "base in shards"])
def test_two_processes_are_one_with_their_rows_together(directory, launcher, env) -> None:
    output = f"two{len(env)}"
    assert launcher.run(2, values(directory, output, 2), env=env) == [0, 0], launcher.said(0)
    run = directory / output
    assert_same_run(run, directory / "whole")
    record = json.loads((run / "run.json").read_text())
    assert record["num_processes"] == 2
    assert record["steps"]["done"] == LAST_STEP
    alone = json.loads((directory / "whole" / "run.json").read_text())
    for count in ("num_tokens", "num_examples"):
        assert record["speed"][count] == alone["speed"][count]
    assert not list(run.rglob("*.partial"))
    assert "2 processes" in launcher.said(0)
    assert "training" in launcher.said(0)
    assert ("FSDP2" in launcher.said(0)) == bool(env)
    assert "steps:" not in launcher.said(1)
    assert "training:" not in launcher.said(1)


def test_a_base_in_4_bits_is_split_like_any_other(directory, launcher) -> None:
    made, alone = values(directory, "nf4_two", 2), values(directory, "nf4_whole", 4)
    made["model"] = alone["model"] = {"ref": made["model"], "quantize": "nf4"}
    assert launcher.run(1, alone) == [0]
    assert launcher.run(2, made, env=FSDP2) == [0, 0], launcher.said(0)
    assert "base in nf4" in launcher.said(0)
    # Without the fast paths for whole weights, sums are taken in another order.
    assert_same_run(directory / "nf4_two", directory / "nf4_whole", rel=1e-4, atol=2e-4)
    records = [
        json.loads((directory / n / "run.json").read_text()) for n in ("nf4_two", "nf4_whole")
    ]
    assert records[0]["base"]["sha256"] == records[1]["base"]["sha256"]


def test_zero_3_of_deepspeed_is_the_same_split(directory, launcher, tmp_path) -> None:
    settings = tmp_path / "zero3.json"
    zero = {"stage": 3, "overlap_comm": True, "offload_param": {"device": "cpu"}}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    settings.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto")}))
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
    }
    made = values(directory, "zero3", 2)
    assert launcher.run(2, made, env=env) == [0, 0], launcher.said(0)
    assert "ZeRO-3: the frozen base is split with torch's FSDP2" in launcher.said(0)
    assert_same_run(directory / "zero3", directory / "whole")


@pytest.mark.parametrize(
    ("first", "then", "env"),
    [((2, 2), (1, 4), {}), ((1, 4), (2, 2), {}), ((2, 2), (1, 4), FSDP2)],
    ids=["two into one", "one into two", "shards into one"],
)
def test_a_run_goes_on_in_another_number_of_processes(
    directory, launcher, first, then, env
) -> None:
    output = f"from{first[0]}to{then[0]}{len(env)}"
    num, rows = first
    # A signal that reaches the last process stops all of them behind the same step.
    assert launcher.run(num, values(directory, output, rows), env=env, signal=4) == [130] * num
    assert len([line for line in history(directory / output) if "loss" in line]) == 5
    assert "after step 5 of 9" in launcher.said(0)
    num, rows = then
    codes = launcher.run(num, values(directory, output, rows), resume=True)
    assert codes == [0] * num, launcher.said(0)
    assert f"num_processes {first[0]} -> {num}" in launcher.said(0)
    assert_same_run(directory / output, directory / "whole")


def test_the_rows_taken_together_may_not_change(directory, launcher) -> None:
    output = "batch"
    assert launcher.run(2, values(directory, output, 2), signal=2) == [130, 130]
    before = sorted(str(p) for p in (directory / output).rglob("*"))
    assert launcher.run(1, values(directory, output, 2), resume=True) == [2]
    said = launcher.said(0)
    assert "batch_size x processes = 4" in said
    assert "train.batch_size=4" in said
    assert sorted(str(p) for p in (directory / output).rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_all(directory, launcher) -> None:
    assert launcher.run(2, values(directory, "nan", 2, lr=1e30)) == [1, 1]
    assert "is not finite" in launcher.said(0)
    assert "train.jsonl" in launcher.said(0)
    assert "FailedElsewhereError" in launcher.said(1)


def test_what_one_process_finds_wrong_is_said_once_and_stops_all(directory, launcher) -> None:
    made = values(directory, "whole", 2)
    assert launcher.run(2, made) == [2, 2]
    assert "not empty" in launcher.said(0)
    assert "FailedElsewhereError" in launcher.said(1)
    made = {**values(directory, "dora", 2)}
    made["lora"] = {**made["lora"], "update": "dora"}
    assert launcher.run(2, made, env=FSDP2) == [2, 2]
    assert "lora.update" in launcher.said(0)
    assert not (directory / "dora").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "-m", "lorakit"],
        ["accelerate.commands.launch", "--multi_gpu", *ACCELERATE],
        ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", *ACCELERATE],
    ],
    ids=["torchrun", "accelerate", "accelerate, FSDP2"],
)
def test_launchers_start_it(directory, tmp_path, command) -> None:
    assert_launched(directory, tmp_path, command)


@pytest.mark.slow
def test_accelerate_starts_it_with_settings_of_deepspeed(directory, tmp_path) -> None:
    pytest.importorskip("deepspeed", reason="accelerate's DeepSpeed launcher imports deepspeed")
    settings = tmp_path / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    words = ("--use_deepspeed", "--deepspeed_config_file", str(settings))
    assert_launched(directory, tmp_path, ["accelerate.commands.launch", *words, *ACCELERATE])


def assert_launched(directory: Path, tmp_path: Path, command: list[str]) -> None:
    output = tmp_path / "launched"
    words = [f"output={output}", "data.train=" + str(directory / "train.jsonl")]
    config = tmp_path / "config.yaml"
    made = {**values(directory, "unused", 2), "output": str(output)}
    config.write_text(json.dumps(made))
    done = subprocess.run(
        [sys.executable, "-m", *command, "train", str(config), *words, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # DeepSpeed's launcher has put lines of its own before it.
    assert json.loads(done.stdout[done.stdout.index("{") :])["num_processes"] == 2
    assert_same_run(output, directory / "whole")
