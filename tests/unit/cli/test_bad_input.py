"""Wrong requests from the command line: one clear error, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lorakit.cli.main import main
from lorakit.weights.nf4 import require_nf4


@pytest.fixture
def refused(base, data, tmp_path, capsys):
    """Trains with these changes of a good config; what was said, once it is refused."""

    def train(**changes):
        values = {"model": {"ref": str(base)}, "data": {"train": str(data)}, **changes}
        values["output"] = str(tmp_path / "out")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        before = {path.name for path in tmp_path.iterdir()}
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        assert {path.name for path in tmp_path.iterdir()} == before
        said = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        return said

    return train


@pytest.mark.parametrize("content", ["[1]", "null", "hello", ""])
@pytest.mark.parametrize("verb", ["eval", "generate", "merge", "inspect"])
def test_an_adapter_config_that_is_no_object(verb, content, run_directory, data, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(run_directory / "adapter", adapter)
    (adapter / "adapter_config.json").write_text(content)
    words = {
        "eval": [data, "--adapter", adapter],
        "generate": ["hi", "--adapter", adapter],
        "merge": [adapter, "-o", tmp_path / "out"],
        "inspect": [adapter],
    }[verb]
    assert main([verb, *map(str, words)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the adapter's configuration is not" in said
    assert "remedy copy the directory again" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["inspect", "analyze"])
def test_an_adapter_that_is_not_finite(verb, run_directory, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(run_directory / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first][0, 0] = float("inf")
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert main([verb, str(adapter)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "numbers that are not finite" in said
    assert "_proj A" in said


def test_4_bits_without_bitsandbytes(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    require_nf4.cache_clear()
    said = refused(model={"ref": "minilm-l6-v2", "quantize": "nf4"})
    assert "need bitsandbytes, which is not installed" in said
    assert "lorakit[quant]" in said
    require_nf4.cache_clear()


def test_what_no_method_can_do(refused, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n")
    assert "longest row does not fit into the model's context" in refused(data={"train": str(long)})
    assert "leave no room in the model's context" in refused(
        method="prefix_layer", prefix_layer={"prefix": 200}
    )
    assert "bottleneck must be a whole number of at least 1" in refused(
        method="houlsby", houlsby={"bottleneck": 0}
    )
    said = refused(lora={"also_train": ["zzz"]})
    assert "matches nothing" in said
    assert "the nearest names are" in said
