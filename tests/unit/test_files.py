"""Directories that are replaced, the old one or the new one under the name; records read back."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit import files
from lorakit.errors import ConfigError, OutputError


def tree(path):
    return {p.name: p.read_text() for p in path.iterdir()}


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_directory_that_is_replaced_leaves_nothing_of_the_old(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "adapter"
    for text in ("first", "second"):
        with files.atomic_directory(target, replace=True) as staging:
            (staging / text).write_text(text)
    assert tree(target) == {"second": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="renameat2 is Linux's")
def test_two_directories_change_places_in_one_step(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).write_text(path.name)
    assert files._exchange(one, other)
    assert tree(one) == {"other": "other"}
    assert tree(other) == {"one": "one"}
    assert not files._exchange(one, tmp_path / "absent")
    assert tree(one) == {"other": "other"}


@pytest.mark.parametrize(
    ("text", "found"),
    [("{", "line 1"), ("[1]", "indices"), ('{"other": 1}', "no key 'config'"), ("3", "subscript")],
)
def test_a_record_that_is_damaged_is_one_clear_error(tmp_path, text, found):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match="an arm's record is damaged") as caught:
        files.read_back(tmp_path / "run.json", "config", of="an arm", remedy="remove it")
    assert found in str(caught.value)


def test_a_record_is_read_back_whole(tmp_path):
    files.write_json(tmp_path / "run.json", {"config": {"r": 3}, "done": True})
    record = files.read_back(tmp_path / "run.json", "config", of="an arm", remedy="remove it")
    assert record == {"config": {"r": 3}, "done": True}


@pytest.fixture
def small_files():
    """No file may grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("numbers", [16_000, 200_000])
def test_a_write_of_torch_that_fails_is_the_disks_refusal(tmp_path, small_files, numbers):
    with (
        pytest.raises(OutputError, match="bytes free") as caught,
        files.atomic_directory(tmp_path / "checkpoint") as staging,
    ):
        torch.save({"exp_avg": torch.ones(numbers)}, staging / "optimizer.pt")
    assert caught.value.exit_code == 2
    assert not any(tmp_path.iterdir())


def test_other_errors_inside_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes") as caught, files.writing(tmp_path):
        raise RuntimeError("shapes do not fit")
    assert type(caught.value) is RuntimeError


def test_what_a_killed_process_left_beside_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_S", 0.0)
    target = tmp_path / "merged[1]"
    with writer(target) as killed, writer(target) as living:
        of_killed, of_living = (Path(p.stdout.readline().strip()) for p in (killed, living))
        killed.kill()
        killed.wait()
        other = tmp_path / ".merged.x.partial"
        other.mkdir()
        with files.atomic_directory(target) as staging:
            (staging / "weights").write_text("new")
            assert not of_killed.exists()
            assert of_living.exists()
        living.communicate("go on")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".merged.x.partial", "merged[1]"]
    assert tree(target) == {"weights": "new"}


def writer(target):
    command = [sys.executable, "-c", _WRITER, str(target)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


_WRITER = """
import sys
from pathlib import Path
from lorakit.files import temporary_beside
with temporary_beside(Path(sys.argv[1])) as made:
    print(made, flush=True)
    sys.stdin.readline()
"""
