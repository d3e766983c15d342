from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from lorakit import environment


def test_versions_name_what_decides_a_result():
    versions = environment.versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "system", "lorakit", "transformers", "safetensors"} <= set(versions)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["/opt/x/bin/lorakit", "paper", "run", "table1"], "lorakit paper run table1"),
        (["/opt/x/lorakit/__main__.py", "train", "a.yaml"], "lorakit train a.yaml"),
        (
            ["/home/me/clone/benchmarks/serve.py", "--data", "/home/me/data", "seeds=[0, 1]"],
            "python benchmarks/serve.py --data DIR 'seeds=[0, 1]'",
        ),
        (["lorakit", "compare", "c.yaml", "data=/home/me"], "lorakit compare c.yaml data=DIR"),
        (["lorakit", "paper", "--output", "/home/me/x"], "lorakit paper --output FILE"),
    ],
)
def test_a_recorded_command_names_no_place_of_this_machine(given, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", given)
    assert environment.command_line() == shown


def test_hardware_counts_the_cores_this_process_may_use():
    hardware = environment.hardware()
    assert hardware["num_cores"] == len(os.sched_getaffinity(0))
    assert hardware["memory_bytes"] <= psutil.virtual_memory().total
    assert hardware["cpu"]
    assert len(hardware["gpus"]) == torch.cuda.device_count()


def test_peak_memory_grows_with_what_was_held_and_never_falls():
    before = environment.peak_memory_bytes()
    held = np.ones(60_000_000 // 8 + before // 8)
    grown = environment.peak_memory_bytes()
    assert grown >= before + 50_000_000
    del held
    # The kernel counts pages in batches, per core.
    assert environment.peak_memory_bytes() >= grown - 1_000_000


def test_bf16_support_agrees_with_the_processor():
    flags = set(environment.hardware()["instruction_sets"])
    assert environment.supports_bf16("cpu") == bool(flags & {"avx512_bf16", "amx_bf16"})
    if not torch.cuda.is_available():
        assert environment.supports_bf16("cuda") is False


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A control-group tree whose root limits memory to 3 GB, of which 1 GB is used."""
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\ninactive_file 500000000\n")
    monkeypatch.setattr(environment, "_CGROUP_ROOT", tmp_path)
    return tmp_path


def test_a_containers_limit_bounds_memory_and_its_page_cache_does_not_count(container):
    assert environment.total_memory_bytes() == min(3_000_000_000, psutil.virtual_memory().total)
    free = psutil.virtual_memory().available
    if free > 2_000_000_000:
        assert environment.available_memory_bytes() == 2_000_000_000


def test_a_container_without_a_limit_does_not_bound_memory(container):
    (container / "memory.max").write_text("max\n")
    assert environment.total_memory_bytes() == psutil.virtual_memory().total


def test_the_peak_of_a_small_process_is_not_that_of_the_large_one_that_started_it():
    held = np.ones(900_000_000 // 8)
    code = (
        "import os; from lorakit.environment import memory_bytes, peak_memory_bytes; "
        "print(peak_memory_bytes(), memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, now = map(int, done.stdout.split())
    assert held.nbytes > 1.2 * peak
    assert 0 < now <= peak + 1_000_000
