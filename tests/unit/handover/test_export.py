"""What other engines are given: exact, checked, refused where it cannot be."""

from __future__ import annotations

import ast
import importlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import use
from lorakit.adapters.spec import LoraSpec
from lorakit.cli.main import main
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.foreign import Conversion
from lorakit.formats.gguf_lora import GgufFormat
from lorakit.formats.mlx import MlxFormat
from lorakit.formats.peft import save_adapter
from lorakit.handover.commands import lint_command
from lorakit.handover.rules import VLLM_MAX_RANKS, vllm_max_rank
from lorakit.handover.run import Engine, export_adapter

Tiny = Callable[..., PreTrainedModel]
MIXED = LoraSpec(
    r=4,
    alpha=12,
    targets="all-linear",
    rank_pattern={"q_proj": 6, "down_proj": 2},
    alpha_pattern={"v_proj": 20},
)
IDS = torch.tensor([[5, 9, 30, 7], [11, 4, 4, 60]])


def saved(tiny: Tiny, path: Path, spec: LoraSpec, kind: str = "llama") -> PreTrainedModel:
    """A model with a learned adapter, and the adapter in `path`."""
    model = tiny(kind)
    model.requires_grad_(False)
    attach_learned(model, spec, "a")
    save_adapter(model, path, "a")
    return model


def vllm_delta(path: Path, module: str) -> torch.Tensor:
    """B A lora_alpha / r with the configuration's one r and alpha, as vLLM computes it."""
    config = json.loads((path / "adapter_config.json").read_text())
    factors = next(iter(Adapter.load(path).modules()[module].values()))
    assert config["rank_pattern"] == {}
    assert config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert factors.r == config["r"]
    return config["lora_alpha"] / config["r"] * factors.B @ factors.A


def test_vllm_computes_the_same_change_from_one_rank_and_one_scaling(
    tiny: Tiny, tmp_path: Path
) -> None:
    saved(tiny, tmp_path / "a", MIXED)
    done = export_adapter(tmp_path / "a", tmp_path / "out", engine="vllm", base="org/base")
    before = Adapter.load(tmp_path / "a")
    assert {f.r for f in before.factors.values()} == {2, 4, 6}
    for module in before.modules():
        torch.testing.assert_close(
            vllm_delta(tmp_path / "out", module), before.delta(module), rtol=1e-5, atol=1e-6
        )
    assert any("padded" in change for change in done.changed)
    assert any("scaling" in change for change in done.changed)
    words = shlex.split(done.command)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert f"out={(tmp_path / 'out').resolve()}" in words
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_what_is_uniform_already_is_written_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    spec = LoraSpec(r=4, alpha=16, targets="qv", scaling="alpha/sqrt(r)")
    saved(tiny, tmp_path / "a", spec)
    done = export_adapter(tmp_path / "a", tmp_path / "out", engine="vllm", base="org/base")
    assert done.changed == []
    before, after = Adapter.load(tmp_path / "a"), Adapter.load(tmp_path / "out")
    for module in before.modules():
        assert before.delta(module).equal(after.delta(module))


def test_peft_answers_as_the_live_adapter_does(tiny: Tiny, tmp_path: Path) -> None:
    model = saved(tiny, tmp_path / "a", MIXED)
    export_adapter(tmp_path / "a", tmp_path / "out", engine="vllm", base="org/base")
    with torch.no_grad(), use(model, "a"):
        live = model(IDS).logits
    with torch.no_grad(), use(model, None):
        base = model(IDS).logits
    other = tiny("llama")
    other.load_state_dict(unwrapped(model))
    theirs = PeftModel.from_pretrained(other, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(live, base, atol=1e-2)


def unwrapped(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The base's own weights, whatever wraps them."""
    return {
        name.replace(".base.", "."): value
        for name, value in model.state_dict().items()
        if ".branches." not in name and "lora_" not in name
    }


RS = LoraSpec(
    r=4,
    alpha=6,
    targets=("q_proj", "k_proj", "down_proj"),
    scaling="alpha/sqrt(r)",
    rank_pattern={"down_proj": 2},
)


def saved_over(tiny: Tiny, path: Path, spec: LoraSpec, kind: str = "llama") -> tuple[Path, str]:
    """A learned adapter, and the directory of its base."""
    tiny(kind).save_pretrained(path / "base")
    saved(tiny, path / "a", spec, kind)
    return path / "a", str(path / "base")


@pytest.mark.parametrize("spec", [MIXED, RS], ids=["mixed", "rslora"])
def test_llama_cpp_gets_one_file_with_every_change(
    tiny: Tiny, tmp_path: Path, spec: LoraSpec
) -> None:
    source, base = saved_over(tiny, tmp_path, spec)
    done = export_adapter(source, tmp_path / "out", engine="llama.cpp", base=base, name="sql")
    assert done.files == ["adapter.gguf"]
    first, serve = done.command.split(" && ")
    made = str(tmp_path / "out" / "base.gguf")
    assert shlex.split(first) == ["python", "convert_hf_to_gguf.py", base, "--outfile", made]
    assert shlex.split(serve) == [
        *("llama-server", "--model", made, "--lora", str(tmp_path / "out" / "adapter.gguf")),
        *("--alias", "sql", "--host", "127.0.0.1"),
    ]
    assert any("moved into B" in change for change in done.changed)
    assert any("rsLoRA" in change for change in done.changed) == (spec is RS)
    # Asked for by rank and alpha of the file alone, every change is what it was.
    given = Conversion(model=tiny("llama"), base=base)
    again, before = GgufFormat().read(tmp_path / "out", given), Adapter.load(source)
    assert len({f.scaling * f.r for f in again.factors.values()}) == 1
    for module in before.modules():
        torch.testing.assert_close(again.delta(module), before.delta(module), rtol=1e-5, atol=1e-6)


def test_a_hub_base_of_llama_cpp_is_converted_from_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    source, base = saved_over(tiny, tmp_path, RS)
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    # The hub cannot be reached here: names and shapes come from the base that the adapter names.
    done = export_adapter(source, tmp_path / "out", engine="llama.cpp", base="org/base")
    assert "convert_hf_to_gguf.py org/base --outfile" in done.command
    assert " --remote && " in done.command


@pytest.mark.parametrize("update", ["lora", "dora"])
def test_mlx_lm_takes_the_directory_and_the_command(
    tiny: Tiny, tmp_path: Path, update: Literal["lora", "dora"]
) -> None:
    source, base = saved_over(tiny, tmp_path, replace(RS, update=update))
    done = export_adapter(source, tmp_path / "out", engine="mlx", base=base)
    words = shlex.split(done.command)
    directory = str(tmp_path / "out")
    assert words[:5] == ["mlx_lm.generate", "--model", base, "--adapter-path", directory]
    assert done.files == ["adapter_config.json", "adapters.safetensors"]
    assert any("padded with zeros to 4" in change for change in done.changed)
    again = MlxFormat().read(tmp_path / "out", Conversion(model=tiny("llama"), base=base))
    before = Adapter.load(source)
    weights = dict(tiny("llama").named_modules())
    for module in before.modules():
        weight = weights[module].get_parameter("weight").detach()
        torch.testing.assert_close(
            again.delta(module, weight), before.delta(module, weight), rtol=1e-5, atol=1e-6
        )
    pytest.importorskip("mlx.core")
    theirs = importlib.import_module("mlx_lm.generate").setup_arg_parser().parse_args(words[1:])
    assert (theirs.model, theirs.adapter_path) == (base, directory)


@pytest.mark.parametrize(
    ("engine", "spec", "named"),
    [
        (
            "llama.cpp",
            LoraSpec(targets="qv", update="dora", also_train=("lm_head",)),
            ["DoRA", "lm_head"],
        ),
        ("mlx", LoraSpec(targets="qv", also_train=("lm_head",)), ["lm_head"]),
        ("mlx", LoraSpec(targets=("embed_tokens", "q_proj"), update="dora"), ["embedding"]),
    ],
)
def test_what_their_formats_cannot_hold_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, engine: Engine, spec: LoraSpec, named: list[str]
) -> None:
    source, base = saved_over(tiny, tmp_path, spec)
    with pytest.raises(AdapterFileError, match="cannot serve this adapter") as caught:
        export_adapter(source, tmp_path / "out", engine=engine, base=base)
    assert all(word in (caught.value.found or "") for word in named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx"])
def test_a_tied_embedding_is_refused_where_the_head_would_change_too(
    tiny: Tiny, tmp_path: Path, engine: Engine
) -> None:
    with pytest.warns(LorakitWarning, match="shares its weight"):
        source, base = saved_over(
            tiny, tmp_path, LoraSpec(targets=("embed_tokens", "q_proj")), "llama-tied"
        )
    with pytest.raises(RequestError, match="tied"):
        export_adapter(source, tmp_path / "out", engine=engine, base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (LoraSpec(targets="qv", update="dora"), ["DoRA"]),
        (LoraSpec(targets="qv", also_train=("lm_head",)), ["lm_head"]),
        (LoraSpec(targets=("embed_tokens", "q_proj")), ["embedding"]),
        (
            LoraSpec(targets=("embed_tokens", "q_proj"), also_train=("lm_head",)),
            ["lm_head", "embedding"],
        ),
    ],
    ids=["dora", "beside", "embedding", "everything at once"],
)
def test_what_vllm_cannot_compute_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, spec: LoraSpec, named: list[str]
) -> None:
    saved(tiny, tmp_path / "a", spec)
    with pytest.raises(AdapterFileError, match="vLLM cannot serve") as caught:
        export_adapter(tmp_path / "a", tmp_path / "out", engine="vllm", base="org/base")
    assert all(word in (caught.value.found or "") for word in named)
    assert not (tmp_path / "out").exists()


def test_conv1d_is_refused_for_vllm_and_written_for_peft(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "a", LoraSpec(targets=("c_proj",)), "gpt2")
    with pytest.raises(AdapterFileError, match="vLLM cannot serve"):
        export_adapter(tmp_path / "a", tmp_path / "v", engine="vllm", base="org/base")
    done = export_adapter(tmp_path / "a", tmp_path / "p", engine="peft", base="org/base")
    assert "PeftModel.from_pretrained" in done.command


def test_ray_serve_gets_an_application(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "a", MIXED)
    done = export_adapter(tmp_path / "a", tmp_path / "out", engine="ray-serve", base="org/base")
    text = (tmp_path / "out" / "ray_serve.py").read_text()
    tree = ast.parse(text)
    assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    assert "app" in {t.id for t in assigned if isinstance(t, ast.Name)}
    assert '"max_lora_rank": 8' in text
    assert repr(str(tmp_path.resolve())) in text
    assert done.command.endswith("serve run ray_serve:app")
    assert Adapter.load(tmp_path / "out").modules()


def test_a_base_that_only_we_know_needs_another_name(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "a", MIXED)
    with pytest.raises(RequestError, match="only lorakit knows"):
        export_adapter(
            tmp_path / "a", tmp_path / "out", engine="vllm", base="smollm2-135m-instruct"
        )
    with pytest.raises(RequestError, match="name"):
        export_adapter(tmp_path / "a", tmp_path / "o", engine="vllm", base="b", name="a b;rm")


def test_ranks_are_rounded_up_to_what_vllm_takes() -> None:
    assert [vllm_max_rank(r) for r in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    assert list(VLLM_MAX_RANKS) == sorted(VLLM_MAX_RANKS)


def test_the_lint_sees_what_is_wrong() -> None:
    flags = {"--on": 0, "--port": 1}
    lint_command("serve x --on --port 3 y", ("serve",), flags)
    for wrong in ("sevre --on", "serve --off", "serve --port", "serve --port --on"):
        with pytest.raises(RequestError):
            lint_command(wrong, ("serve",), flags)


def test_the_verb(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny, tmp_path / "a", MIXED)
    words = ["export", str(tmp_path / "a"), "--for", "vllm", "--base", "org/base", "-o"]
    assert main([*words, str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["engine"] == "vllm"
    assert "adapter_model.safetensors" in record["files"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert main([*words, str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("vllm serve org/base")
    assert main(["export", str(tmp_path), "--for", "vllm", "-o", str(tmp_path / "x")]) == 2
