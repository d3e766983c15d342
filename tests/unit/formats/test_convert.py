"""Round trips through every foreign format, and what each of them refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models
from learned import attach_learned, expected_warning
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.targets import base_modules
from lorakit.cli.main import main
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import AdapterFileError, LorakitWarning, OutputError, RequestError
from lorakit.formats.peft import read_adapter

MIXED: dict[str, Any] = {
    "targets": ("q_proj", "k_proj", "down_proj"),
    "r": 3,
    "alpha": 7.5,
    "rank_pattern": {"down_proj": 5},
    "alpha_pattern": {"layers.1.self_attn.k_proj": 2.0},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base("llama", tmp_path)


def saved_base(name: str, tmp_path: Path) -> Path:
    tiny_models.build(name).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(name: str, tmp_path: Path, warns: str | None = None, **spec: Any) -> Path:
    model = tiny_models.build(name)
    with expected_warning(warns):
        attach_learned(model, LoraSpec(**spec))
    adapter_from_model(model).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def changes(adapter: Adapter, name: str) -> dict[str, Tensor]:
    modules = base_modules(tiny_models.build(name))
    return {
        m: adapter.delta(m, modules[m].get_parameter("weight").detach()) for m in adapter.modules()
    }


def assert_same(first: Adapter, second: Adapter, name: str) -> None:
    mine, theirs = changes(first, name), changes(second, name)
    assert mine.keys() == theirs.keys()
    for module, change in mine.items():
        torch.testing.assert_close(theirs[module], change, rtol=1e-5, atol=1e-6)


ROUND_TRIPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlx": ("mlx", "llama", MIXED),
    "mlx-embedding": ("mlx", "llama", {"targets": ("embed_tokens", "v_proj"), "r": 2}),
    "mlx-dora": ("mlx", "llama", {**MIXED, "update": "dora"}),
    "gguf": ("gguf", "llama", MIXED),
    "gguf-embedding": ("gguf", "llama", {"targets": ("embed_tokens", "v_proj"), "r": 2}),
    "gguf-qwen3": ("gguf", "qwen3", {"targets": "all-linear", "r": 2, "alpha": 7.5}),
    "gguf-phi3-parts": ("gguf", "phi3", {"targets": ("qkv_proj.v", "o_proj"), "r": 2}),
    "kohya": ("kohya", "llama", MIXED),
    "kohya-bert": ("kohya", "bert", {"targets": "all-linear", "r": 2, "alpha": 7.5}),
    "loralib": ("loralib", "roberta", {"targets": "qv", "r": 3, "alpha": 7.5}),
    "loralib-mixed": ("loralib", "llama", MIXED),
    "loralib-parts": ("loralib", "gpt2", {"targets": "qv", "r": 3, "alpha": 7.5}),
    "peft": ("peft", "llama", MIXED),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    to, name, spec = ROUND_TRIPS[case]
    base = saved_base(name, tmp_path)
    adapter = saved_adapter(name, tmp_path, **spec)
    record = convert(adapter, tmp_path / "there", to, base=str(base))
    assert record["max_relative_error"] < 1e-6
    assert Path(record["output"]).exists()
    options = ConvertOptions()
    if to == "loralib":
        parts = ("q", "v") if "parts" in case else ()
        options = ConvertOptions(alpha=record["alpha"], parts=parts)
    back = convert(record["output"], tmp_path / "back", "peft", base=str(base), options=options)
    assert back["from"] == to
    assert_same(read_adapter(adapter), read_adapter(tmp_path / "back"), name)


def test_names_and_shapes_of_mlx(base: Path, tmp_path: Path) -> None:
    """The documented layout: transposed factors, one rank, scale the multiplier itself."""
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3, alpha=7.5)
    convert(adapter, tmp_path / "mlx", "mlx", base=str(base))
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    factors = read_adapter(adapter).factors["model.layers.1.self_attn.q_proj"]
    key = "model.layers.1.self_attn.q_proj.lora_"
    assert tensors[f"{key}a"].equal(factors.A.T)
    assert tensors[f"{key}b"].equal(factors.B.T)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 2.5,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj"],
    }


def test_names_of_kohya(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3, alpha=7.5)
    options = ConvertOptions(prefix="lora_te1")
    record = convert(adapter, tmp_path / "kohya", "kohya", base=str(base), options=options)
    tensors = load_file(record["output"])
    key = "lora_te1_model_layers_0_self_attn_q_proj"
    assert tensors[f"{key}.lora_down.weight"].shape == (3, 32)
    assert float(tensors[f"{key}.alpha"]) == 7.5


def test_refused_by_the_target(base: Path, tmp_path: Path) -> None:
    dora = saved_adapter("llama", tmp_path, targets="qv", update="dora")
    for to in ("gguf", "kohya", "loralib"):
        with pytest.raises(RequestError, match="magnitudes of a DoRA"):
            convert(dora, tmp_path / to, to, base=str(base))
        assert not (tmp_path / to).exists()


def test_parameters_beside_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets="qv", also_train=("norm",))
    for to in ("gguf", "kohya", "mlx"):
        with pytest.raises(RequestError, match="trained parameters beside"):
            convert(adapter, tmp_path / to, to, base=str(base))


def test_refused_geometries(tmp_path: Path) -> None:
    base = saved_base("vit", tmp_path)
    adapter = saved_adapter("vit", tmp_path, targets=("projection",), r=2)
    for to, reason in (("mlx", "geometry"), ("loralib", "another way"), ("gguf", "not known here")):
        with pytest.raises(RequestError, match=reason):
            convert(adapter, tmp_path / to, to, base=str(base))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_have_no_tensor_of_their_own_in_gguf(target: str, tmp_path: Path) -> None:
    base = saved_base("llama-tied", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakitWarning)
        adapter = saved_adapter("llama-tied", tmp_path, targets=(target, "q_proj"), r=2)
    with pytest.raises(RequestError, match="embedding and head are tied"):
        convert(adapter, tmp_path / "gguf", "gguf", base=str(base))


def test_parts_that_loralib_cannot_stack(tmp_path: Path) -> None:
    base = saved_base("bloom", tmp_path)
    adapter = saved_adapter("bloom", tmp_path, targets="qv", r=2)
    with pytest.raises(RequestError, match="equal parts, one after the other"):
        convert(adapter, tmp_path / "made", "loralib", base=str(base))


def test_what_a_loralib_file_does_not_say(tmp_path: Path) -> None:
    base = str(saved_base("gpt2", tmp_path))
    adapter = saved_adapter("gpt2", tmp_path, targets="qv", r=3, alpha=7.5)
    made = convert(adapter, tmp_path / "made", "loralib", base=base)["output"]
    with pytest.raises(RequestError, match="do not hold alpha"):
        convert(made, tmp_path / "back", "peft", base=base)
    with pytest.warns(LorakitWarning, match="two are taken for q and v"):
        convert(made, tmp_path / "back", "peft", base=base, options=ConvertOptions(alpha=7.5))
    assert_same(read_adapter(adapter), read_adapter(tmp_path / "back"), "gpt2")
    wrong = ConvertOptions(alpha=7.5, parts=("q", "k", "v"))
    with pytest.raises(AdapterFileError, match="cannot be told"):
        convert(made, tmp_path / "wrong", "peft", base=base, options=wrong)


def test_torchtunes_own_names_are_not_taken_for_loralibs(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_0.pt"
    key = "layers.0.attn.q_proj.lora_{}.weight"
    torch.save({key.format("a"): torch.ones(3, 32), key.format("b"): torch.ones(32, 3)}, file)
    with pytest.raises(AdapterFileError, match="torchtune"):
        convert(file, tmp_path / "a", "peft", base=str(base), options=ConvertOptions(alpha=6))


def test_foreign_files_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3)
    record = convert(adapter, tmp_path / "kohya", "kohya", base=str(base))
    file = Path(record["output"])
    tensors = load_file(file)
    lost = {k: t for k, t in tensors.items() if "layers_0" not in k or "lora_up" not in k}
    save_file(lost, file)
    with pytest.raises(AdapterFileError, match="stands without the other"):
        convert(file, tmp_path / "a", "peft", base=str(base))
    save_file({k.replace("layers_0", "layers_7"): t for k, t in tensors.items()}, file)
    with pytest.raises(AdapterFileError, match="does not have"):
        convert(file, tmp_path / "b", "peft", base=str(base))
    save_file({k.replace("lora_te", "lora_unet"): t for k, t in tensors.items()}, file)
    with pytest.raises(AdapterFileError, match="image model"):
        convert(file, tmp_path / "c", "peft", base=str(base))
    save_file({**tensors, "x.dora_scale": torch.ones(2)}, file)
    with pytest.raises(AdapterFileError, match="not plain LoRA"):
        convert(file, tmp_path / "d", "peft", base=str(base))
    broken = {k: t * float("nan") if "lora_up" in k else t for k, t in tensors.items()}
    save_file(broken, file)
    with pytest.raises(AdapterFileError, match="not finite"):
        convert(file, tmp_path / "e", "peft", base=str(base))
    file.write_bytes(b"nonsense")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        convert(
            file,
            tmp_path / "f",
            "peft",
            base=str(base),
            options=ConvertOptions(source_format="kohya"),
        )


def test_other_bases_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3)
    gguf = convert(adapter, tmp_path / "gguf", "gguf", base=str(base))["output"]
    mlx = convert(adapter, tmp_path / "mlx", "mlx", base=str(base))["output"]
    (tmp_path / "o").mkdir()
    other = str(saved_base("qwen3", tmp_path / "o"))
    with pytest.raises(AdapterFileError, match="another architecture"):
        convert(gguf, tmp_path / "a", "peft", base=other)
    with pytest.raises(AdapterFileError, match="other shapes"):
        convert(mlx, tmp_path / "b", "peft", base=other)
    config = Path(mlx) / "adapter_config.json"
    config.write_text(json.dumps({"lora_parameters": {"rank": 3, "alpha": 8}}))
    with pytest.raises(AdapterFileError, match="cannot be used"):
        convert(mlx, tmp_path / "c", "peft", base=str(base))


def test_an_alpha_beside_mlx_scale_is_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=4, alpha=6)
    made = convert(adapter, tmp_path / "mlx", "mlx", base=str(base))["output"]
    file = Path(made) / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["alpha"] = 16
    file.write_text(json.dumps(config))
    # Where layers are counted as num_layers, the scale alone counts.
    convert(made, tmp_path / "today", "peft", base=str(base))
    assert_same(read_adapter(adapter), read_adapter(tmp_path / "today"), "llama")
    config["lora_layers"] = config.pop("num_layers")
    file.write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"--alpha 24 \(as it was then\), or --alpha 6"):
        convert(made, tmp_path / "then", "peft", base=str(base))
    options = ConvertOptions(alpha=24.0)
    convert(made, tmp_path / "then", "peft", base=str(base), options=options)
    (site,) = {f.scaling for f in read_adapter(tmp_path / "then").factors.values()}
    assert site == 6.0


def test_an_activated_gguf_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3)
    made = convert(adapter, tmp_path / "gguf", "gguf", base=str(base))["output"]
    reader = gguf.GGUFReader(made)
    writer = gguf.GGUFWriter(tmp_path / "activated.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith(("general.type", "adapter.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_array("adapter.alora.invocation_tokens", [5, 6])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterFileError, match="activated LoRA"):
        convert(tmp_path / "activated.gguf", tmp_path / "a", "peft", base=str(base))


def test_requests_that_cannot_be(base: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = saved_adapter("llama", tmp_path, targets=("q_proj",), r=3)
    with pytest.raises(RequestError, match="did you mean 'kohya'"):
        convert(adapter, tmp_path / "a", "kohia", base=str(base))
    with pytest.raises(RequestError, match="the base is needed"):
        convert(adapter, tmp_path / "a", "mlx")
    with pytest.raises(AdapterFileError, match="no adapter of a known format"):
        convert(tmp_path / "nowhere", tmp_path / "a", "mlx", base=str(base))
    with pytest.raises(OutputError, match="not empty"):
        convert(adapter, base, "mlx", base=str(base))
    with pytest.raises(RequestError, match="two layouts"):
        convert(adapter, tmp_path / "a", "peft-0.18", base=str(base))
    words = ["convert", str(adapter), "--to", "gguf", "-o", str(tmp_path / "cli")]
    assert main(words) == 2
    assert "--base REF" in capsys.readouterr().err
    assert main([*words, "--base", str(base)]) == 0
    assert "relative error at most" in capsys.readouterr().out
    assert (tmp_path / "cli" / "adapter.gguf").is_file()
