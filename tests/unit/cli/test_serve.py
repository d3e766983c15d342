"""What the verb says when the server answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny_server
from lorakit.cli.serve import say_ready
from lorakit.serve.request import EngineOptions
from lorakit.serve.start import ServeSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.write_base(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.write_adapters(base, tmp_path_factory.mktemp("adapters"))


def test_what_is_refused_is_said_at_the_start(
    base: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapters / "sql", tmp_path / "sql" / "adapter")
    shutil.copytree(adapters / "sql", tmp_path / "experts")
    config = tmp_path / "experts" / "adapter_config.json"
    experts = {"target_parameters": ["mlp.experts.down_proj"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **experts}))
    settings = ServeSettings(model=str(base), engine=EngineOptions(adapters_dir=tmp_path))
    with tiny_server.in_process(settings) as service:
        say_ready(service, "http://127.0.0.1:1", as_json=True)
        record = json.loads(capsys.readouterr().out)
        say_ready(service, "http://127.0.0.1:1", as_json=False)
    assert record["adapters"] == ["sql"]
    assert "target_parameters" in record["refused"]["experts"]
    out, err = capsys.readouterr()
    assert "serving tiny and 1 adapter on http://127.0.0.1:1" in out
    assert "the adapter experts is not served" in err


@pytest.mark.parametrize("inside", ["adapter", "nothing"])
def test_a_directory_without_adapters_says_what_one_is(
    base: Path, adapters: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = adapters / "sql" if inside == "adapter" else tmp_path
    settings = ServeSettings(model=str(base), engine=EngineOptions(adapters_dir=directory))
    with tiny_server.in_process(settings) as service:
        say_ready(service, "http://127.0.0.1:1", as_json=False)
    words = " ".join(capsys.readouterr().err.split())
    wanted = "the directory above it" if inside == "adapter" else "there are no adapters in"
    assert wanted in words
