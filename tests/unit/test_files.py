"""Directories that are replaced, the old one or the new one under the name; records read back."""

from __future__ import annotations

import os

import pytest

from lorakit import files
from lorakit.errors import ConfigError


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
