"""What a path is taken for, and options that nobody would read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from learned import attach_learned
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.peft import read_adapter
from lorakit.formats.registry import format_of

NAMES = {"mlx": "", "gguf": "adapter.gguf", "kohya": "lora.safetensors", "loralib": "lora.pt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter in every format, each in a directory of its name."""
    path = tmp_path_factory.mktemp("made")
    model = tiny_models.build("llama")
    model.save_pretrained(path / "base")
    attach_learned(model, LoraSpec(targets=("q_proj", "down_proj"), r=3, alpha=7.5))
    adapter_from_model(model).save(path / "peft")
    for name in NAMES:
        convert(path / "peft", path / name, name, base=str(path / "base"))
    return path


@pytest.mark.parametrize("name", [*NAMES, "peft"])
def test_a_directory_that_convert_wrote_is_recognised(name: str, made: Path) -> None:
    assert format_of(made / name) == name
    if name in NAMES:
        assert format_of(made / name / NAMES[name]) == name


def test_a_directory_of_two_formats_is_asked_back(made: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(made / "peft", both)
    shutil.copy(made / "loralib" / "lora.pt", both)
    with pytest.raises(AdapterFileError, match="several formats") as caught:
        format_of(both)
    assert "--from loralib or --from peft" in str(caught.value)
    (both / "lora.pt").unlink()
    shutil.copy(made / "mlx" / "adapters.safetensors", both)
    with pytest.raises(AdapterFileError, match="--from mlx or --from peft"):
        format_of(both)
    options = ConvertOptions(source_format="peft")
    base = str(made / "base")
    assert convert(both, tmp_path / "out", "kohya", base=base, options=options)["from"] == "peft"


@pytest.mark.parametrize("file", ["peft/adapter_model.safetensors", "mlx/adapter_config.json"])
def test_a_file_of_a_directory_names_the_directory(file: str, made: Path) -> None:
    with pytest.raises(AdapterFileError, match="a part of an adapter's directory") as caught:
        format_of(made / file)
    assert str((made / file).parent) in str(caught.value)


def test_files_of_no_known_format(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    data = (made / "kohya" / "lora.safetensors").read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterFileError, match="cannot be read"):
        format_of(file)
    save_file({"unet.up.lora_C": torch.ones(2)}, file)
    with pytest.raises(AdapterFileError, match=r"tensors such as unet\.up\.lora_C"):
        format_of(file)
    save_file({"roberta.query.lora_A": torch.ones(2, 2)}, file)
    assert format_of(file) == "loralib"


def test_peft_s_tensors_in_a_state_dict(made: Path, tmp_path: Path) -> None:
    torch.save(load_file(made / "peft" / "adapter_model.safetensors"), tmp_path / "model.bin")
    options = ConvertOptions(alpha=7.5)
    with pytest.raises(AdapterFileError, match="PEFT's names") as caught:
        convert(
            tmp_path / "model.bin",
            tmp_path / "out",
            "peft",
            base=str(made / "base"),
            options=options,
        )
    assert "adapter_config.json" in str(caught.value)


UNREAD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alpha": ("peft", "gguf", {"alpha": 16.0}),
    "alpha of kohya": ("kohya/lora.safetensors", "peft", {"alpha": 16.0}),
    "parts": ("peft", "loralib", {"parts": ("q", "v")}),
    "prefix": ("peft", "gguf", {"prefix": "lora_te1"}),
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_option_that_nobody_reads_is_said(case: str, made: Path, tmp_path: Path) -> None:
    source, to, options = UNREAD[case]
    with pytest.warns(LorakitWarning, match=f"nobody reads --{case.split()[0]}"):
        record = convert(
            made / source,
            tmp_path / "out",
            to,
            base=str(made / "base"),
            options=ConvertOptions(**options),
        )
    assert record["alpha"] == 7.5


def test_parts_where_no_projection_is_fused(made: Path, tmp_path: Path) -> None:
    options = ConvertOptions(alpha=7.5, parts=("q", "v"))
    with pytest.raises(RequestError, match="adapts no fused projection"):
        convert(
            made / "loralib", tmp_path / "out", "peft", base=str(made / "base"), options=options
        )


def test_loralib_is_written_for_the_alpha_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    base, options = str(made / "base"), ConvertOptions(alpha=16.0)
    record = convert(made / "peft", tmp_path / "out", "loralib", base=base, options=options)
    assert record["alpha"] == 16.0
    state = torch.load(record["output"], weights_only=True)
    before = read_adapter(made / "peft").factors["model.layers.0.self_attn.q_proj"]
    A, B = (state[f"model.layers.0.self_attn.q_proj.lora_{letter}"] for letter in "AB")
    torch.testing.assert_close(16 / 3 * B @ A, 2.5 * before.B @ before.A)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_cannot_be(alpha: float, made: Path, tmp_path: Path) -> None:
    options = ConvertOptions(alpha=alpha)
    for source, to in (("peft", "loralib"), ("loralib", "peft")):
        with pytest.raises(RequestError, match="positive number"):
            convert(made / source, tmp_path / "a", to, base=str(made / "base"), options=options)


def test_another_base_of_a_loralib_file(made: Path, tmp_path: Path) -> None:
    tiny_models.build("qwen3").save_pretrained(tmp_path / "other")
    options = ConvertOptions(alpha=7.5)
    with pytest.raises(AdapterFileError, match="other shapes"):
        convert(
            made / "loralib",
            tmp_path / "out",
            "peft",
            base=str(tmp_path / "other"),
            options=options,
        )


def test_mlx_lm_s_older_npz(made: Path, tmp_path: Path) -> None:
    source = tmp_path / "mlx"
    shutil.copytree(made / "mlx", source)
    file = source / "adapters.safetensors"
    np.savez(source / "adapters.npz", **{k: t.numpy() for k, t in load_file(file).items()})
    file.unlink()
    convert(source, tmp_path / "out", "peft", base=str(made / "base"))
    before, after = read_adapter(made / "peft"), read_adapter(tmp_path / "out")
    for module in before.modules():
        torch.testing.assert_close(after.delta(module), before.delta(module))
    (source / "adapters.npz").write_bytes(b"PK nonsense")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        convert(source, tmp_path / "again", "peft", base=str(made / "base"))
