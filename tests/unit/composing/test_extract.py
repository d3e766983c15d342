"""A fine-tuned model as an adapter: what it holds, what it leaves out, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import tiny_models
from learned import attach_learned
from lorakit.adapters.attach import detach
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import Bias, LoraSpec
from lorakit.cli.main import main
from lorakit.composing.extract import extract, extract_with_report
from lorakit.errors import LorakitWarning, ModelError, SpecError
from lorakit.formats.peft import load_adapter
from lorakit.models.load import load_base_model


def saved(model: PreTrainedModel, path: Path, **options: object) -> Path:
    model.save_pretrained(path, **options)
    return path


def in_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT warns of tied weights that are held whole.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load_base_model(base), str(adapter)).eval()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_a_merged_adapter_comes_back(name: str, tmp_path: Path) -> None:
    base = saved(tiny_models.build(name), tmp_path / "base")
    model = tiny_models.build(name)
    attach_learned(model, LoraSpec(r=3, alpha=7.5, targets="all-linear"))
    adapter = adapter_from_model(model)
    merge(model)
    detach(model)
    # Several shards, so that the two checkpoints are read shard by shard.
    tuned = saved(model, tmp_path / "tuned", max_shard_size="30KB")
    assert len(list(tuned.glob("model-*.safetensors"))) > 1
    found = extract_with_report(base, tuned, LoraSpec(r=3, alpha=3.0, targets="all-linear"))
    assert found.relative_error < 1e-5
    assert not found.rest
    assert {s.name for s in found.sites} == set(adapter.factors)
    for site, factors in adapter.factors.items():
        torch.testing.assert_close(
            found.adapter.factors[site].delta(), factors.delta(), rtol=1e-3, atol=1e-5
        )
    found.adapter.save(tmp_path / "adapter")
    fresh = load_base_model(base)
    # The fingerprint in the passport is that of the base.
    load_adapter(fresh, tmp_path / "adapter")
    given = tiny_models.inputs(fresh)
    torch.testing.assert_close(
        tiny_models.outputs(fresh, given), tiny_models.outputs(model, given), rtol=1e-4, atol=1e-4
    )


def trained(name: str, *parts: str, seed: int = 3) -> PreTrainedModel:
    """A model whose parameters with one of these words in their names moved at full rank."""
    return moved(tiny_models.build(name), *parts, seed=seed)


def moved(model: PreTrainedModel, *parts: str, seed: int = 3) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in parts):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_error_of_a_site_is_its_discarded_tail(tmp_path: Path) -> None:
    base_model, tuned_model = tiny_models.build("llama"), trained("llama", "proj")
    base, tuned = saved(base_model, tmp_path / "base"), saved(tuned_model, tmp_path / "tuned")
    found = extract_with_report(base, tuned, LoraSpec(r=4, alpha=10.0, targets="all-linear"))
    after = dict(tuned_model.named_parameters())
    for site in found.sites:
        name = f"{site.name}.weight"
        change = (after[name] - base_model.get_parameter(name)).detach()
        tail = torch.linalg.svdvals(change)[4:].norm()
        assert site.error == pytest.approx(float(tail), rel=1e-4)
        assert site.norm == pytest.approx(float(change.norm()), rel=1e-5)
        measured = (found.adapter.factors[site.name].delta() - change).norm()
        assert float(measured) == pytest.approx(site.error, rel=1e-3)
    assert 0.3 < found.relative_error < 1


def test_what_is_not_low_rank_is_reported_and_can_be_kept(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    model = trained("llama", "q_proj", "norm", "embed_tokens")
    tuned = saved(model, tmp_path / "tuned")
    with pytest.warns(LorakitWarning, match="changed parameters are not in the adapter"):
        lossy = extract_with_report(base, tuned, LoraSpec(r=32, alpha=32, targets="all-linear"))
    assert {s.name.rpartition(".")[2] for s in lossy.sites} == {"q_proj"}
    assert len(lossy.rest) == 6
    assert not any(rest.kept for rest in lossy.rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = extract(
            base,
            tuned,
            32,
            also_train=("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"),
        )
    adapter.save(tmp_path / "adapter")
    fresh = load_base_model(base)
    load_adapter(fresh, tmp_path / "adapter")
    given = tiny_models.inputs(fresh)
    torch.testing.assert_close(
        tiny_models.outputs(fresh, given), tiny_models.outputs(model, given), rtol=1e-4, atol=1e-4
    )


def test_a_kept_tied_embedding_still_fits_its_base(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama-tied"), tmp_path / "base")
    tuned = saved(trained("llama-tied", "q_proj", "embed_tokens"), tmp_path / "tuned")
    with pytest.warns(LorakitWarning, match=r"1 changed .*: lm_head.weight \(by"):
        made = extract(base, tuned, 4, also_train=("embed_tokens",))
    made.save(tmp_path / "adapter")
    load_adapter(load_base_model(base), tmp_path / "adapter")


HELD: dict[str, dict[str, Any]] = {
    "whole": {"also_train": ("embed_tokens", "lm_head")},
    "low-rank": {"targets": ("all-linear", "embed_tokens", "lm_head")},
    "both": {"targets": ("all-linear", "lm_head"), "also_train": ("embed_tokens",)},
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_a_tied_weight_is_held_in_both_of_its_places(
    held: str, untied: bool, tmp_path: Path
) -> None:
    """An adapter changes a place, not the shared values: the head needs its own change."""
    base = saved(tiny_models.build("llama-tied"), tmp_path / "base")
    model = trained("llama-tied", "q_proj", "embed_tokens")
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
    tuned = saved(model, tmp_path / "tuned")
    made = extract(base, tuned, 32, **HELD[held])
    assert not [rest for rest in made.passport["extraction"]["rest"] if not rest["kept"]]
    made.save(tmp_path / "adapter")
    fresh = load_base_model(base)
    load_adapter(fresh, tmp_path / "adapter")
    given = tiny_models.inputs(fresh)
    wanted = tiny_models.outputs(model, given)
    torch.testing.assert_close(tiny_models.outputs(fresh, given), wanted, rtol=1e-4, atol=1e-4)
    theirs = in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(tiny_models.outputs(theirs, given), wanted, rtol=1e-4, atol=1e-4)


def test_an_untied_base_of_a_tied_model(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    tuned = saved(trained("llama-tied", "q_proj"), tmp_path / "tuned")
    with pytest.warns(LorakitWarning, match=r"lm_head.weight \(by"):
        found = extract_with_report(base, tuned, LoraSpec(r=4, alpha=4, targets="all-linear"))
    assert "lm_head.weight" in {rest.name for rest in found.rest}


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_held_where_asked(name: str, bias: Bias, tmp_path: Path) -> None:
    """Biases that were zero moved too: there is nothing that the change could be a share of."""
    base = saved(tiny_models.build(name), tmp_path / "base")
    words = {"qwen2": ("proj",), "gpt2": ("c_", "ln_"), "bert": ("query", "LayerNorm")}[name]
    moved = words if bias == "all" else words[:1]
    model = trained(name, *moved)
    tuned = saved(model, tmp_path / "tuned")
    with pytest.warns(LorakitWarning, match=r"from zero\).* bias biases"):
        lossy = extract_with_report(base, tuned, LoraSpec(r=96, alpha=96, targets="all-linear"))
    assert {rest.relative for rest in lossy.rest if rest.name.endswith(".bias")} == {None}
    lossy.adapter.save(tmp_path / "lossy")
    more = {"gpt2": ("ln_1", "ln_2", "ln_f"), "bert": ("LayerNorm",)}.get(name, ())
    made = extract(
        base,
        tuned,
        96,
        bias=bias,
        also_train=more if bias == "all" else (),
    )
    assert not [rest for rest in made.passport["extraction"]["rest"] if not rest["kept"]]
    assert made.passport["extraction"]["relative_lost"] < 1e-4
    made.save(tmp_path / "adapter")
    fresh = load_base_model(base)
    load_adapter(fresh, tmp_path / "adapter")
    given = tiny_models.inputs(fresh)
    wanted = tiny_models.outputs(model, given)
    torch.testing.assert_close(tiny_models.outputs(fresh, given), wanted, rtol=1e-4, atol=1e-4)
    theirs = in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(tiny_models.outputs(theirs, given), wanted, rtol=1e-4, atol=1e-4)


def test_the_part_of_a_fused_projection_that_is_not_targeted_is_lost(tmp_path: Path) -> None:
    base_model, tuned_model = tiny_models.build("gpt2"), trained("gpt2", "c_attn.weight")
    base, tuned = saved(base_model, tmp_path / "base"), saved(tuned_model, tmp_path / "tuned")
    spec = LoraSpec(r=32, alpha=32, targets=("c_attn.q", "c_attn.v"))
    with pytest.warns(LorakitWarning, match=r"2 changed .*h.0.attn.c_attn.weight \(by"):
        found = extract_with_report(base, tuned, spec)
    name = "transformer.h.0.attn.c_attn.weight"
    change = (tuned_model.get_parameter(name) - base_model.get_parameter(name)).detach()
    keys = float(change[:, 32:64].norm())
    assert {rest.name: rest.norm for rest in found.rest}[name] == pytest.approx(keys, rel=1e-5)
    assert found.relative_error < 1e-5
    assert found.relative_lost == pytest.approx(3**-0.5, rel=0.1)
    whole = LoraSpec(r=32, alpha=32, targets=("c_attn.q", "c_attn.k", "c_attn.v"))
    assert not extract_with_report(base, tuned, whole).rest


def test_what_was_only_stored_otherwise_did_not_change(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    tuned = saved(trained("llama", "q_proj").bfloat16(), tmp_path / "tuned")
    found = extract_with_report(base, tuned, LoraSpec(r=32, alpha=32, targets="all-linear"))
    assert {site.name.rpartition(".")[2] for site in found.sites} == {"q_proj"}
    assert not found.rest
    assert 0 < found.rounding < 0.01
    same = saved(tiny_models.build("llama").bfloat16(), tmp_path / "same")
    with pytest.raises(ModelError, match="the two models are the same"):
        extract(base, same)
    # What moved less than the rounding is mostly rounding.
    near = tiny_models.build("llama")
    with torch.no_grad():
        near.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(1e-4)
    with pytest.warns(LorakitWarning, match="stored more coarsely than the base"):
        extract(base, saved(near.bfloat16(), tmp_path / "near"))


def test_a_base_in_half_precision(tmp_path: Path) -> None:
    """Loaded in float32, trained and saved so: what stayed is equal, and the rest exact."""
    base = saved(tiny_models.build("llama").bfloat16(), tmp_path / "base")
    model = moved(tiny_models.build("llama").bfloat16().float(), "q_proj")
    tuned = saved(model, tmp_path / "tuned")
    found = extract_with_report(base, tuned, LoraSpec(r=32, alpha=32, targets="all-linear"))
    assert {site.name.rpartition(".")[2] for site in found.sites} == {"q_proj"}
    assert not found.rest
    assert found.rounding == 0
    name = "model.layers.0.self_attn.q_proj"
    before = tiny_models.build("llama").get_parameter(f"{name}.weight").detach().bfloat16()
    wanted = model.get_parameter(f"{name}.weight").detach().double() - before.double()
    error = (found.adapter.factors[name].delta().double() - wanted).norm() / wanted.norm()
    assert float(error) < 1e-5


def test_other_settings_are_said(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    tuned = saved(trained("llama", "q_proj"), tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (tuned / "config.json").write_text(json.dumps(config))
    with pytest.warns(LorakitWarning, match="configurations differ.*rms_norm_eps 1e-06 and 0.001"):
        extract(base, tuned)


def test_a_tuned_model_that_is_not_finite(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    model = trained("llama", "q_proj")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or an infinity(.|\n)*model.norm.weight"):
        extract(base, saved(model, tmp_path / "tuned"))


@pytest.mark.parametrize("make", [tiny_models.qwen3_moe, tiny_models.gpt_oss])
def test_experts_can_be_kept_whole(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    base = saved(tiny_models.seeded(make), tmp_path / "base")
    model = moved(tiny_models.seeded(make), "mlp", "proj")
    tuned = saved(model, tmp_path / "tuned")
    with pytest.warns(LorakitWarning, match=r"experts\.gate_up_proj"):
        lossy = extract_with_report(base, tuned, LoraSpec(r=96, alpha=96, targets="all-linear"))
    assert lossy.relative_lost > 0.5
    made = extract(base, tuned, 96, also_train=("mlp",), bias="lora_only")
    made.save(tmp_path / "adapter")
    given = tiny_models.inputs(model)
    wanted = tiny_models.outputs(model, given)
    fresh = load_base_model(base)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(tiny_models.outputs(fresh, given), wanted, rtol=1e-3, atol=1e-3)
    theirs = in_peft(base, tmp_path / "adapter")
    torch.testing.assert_close(tiny_models.outputs(theirs, given), wanted, rtol=1e-3, atol=1e-3)


def test_tensors_that_are_renamed_on_load(tmp_path: Path) -> None:
    base = saved(tiny_models.build("vit"), tmp_path / "base")
    tuned = saved(trained("vit", "q_proj.weight"), tmp_path / "tuned")
    found = extract_with_report(base, tuned, LoraSpec(r=32, alpha=32, targets="attention"))
    assert found.relative_error < 1e-4
    assert len(found.sites) == 2


def test_refusals(tmp_path: Path) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    other = saved(tiny_models.build("qwen2"), tmp_path / "other")
    with pytest.raises(ModelError, match="different architectures"):
        extract(base, other)
    with pytest.raises(ModelError, match="the two models are the same"):
        extract(base, base)
    norms = saved(trained("llama", "norm"), tmp_path / "norms")
    with pytest.raises(ModelError, match="no targeted weight differs"):
        extract(base, norms)
    with pytest.raises(SpecError, match="at least 1"):
        extract(base, norms, 0)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    small = saved(GPT2LMHeadModel(config), tmp_path / "small")
    config.vocab_size = 44
    grown = saved(GPT2LMHeadModel(config), tmp_path / "grown")
    with pytest.raises(ModelError, match=r"wte.weight: \(40, 32\) and \(44, 32\)(.|\n)*resize"):
        extract(small, grown)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tiny_models.build("llama"), tmp_path / "base")
    tuned = saved(trained("llama", "v_proj"), tmp_path / "tuned")
    words = ["extract", "--base", str(base), "--tuned", str(tuned), "-r", "3"]
    assert main([*words, "-o", str(tmp_path / "made"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [site["r"] for site in facts["sites"]] == [3, 3]
    assert facts["relative_error"] > 0
    assert main([*words, "-o", str(tmp_path / "made")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "table")]) == 0
    assert "left out" in capsys.readouterr().out
    same = ["extract", "--base", str(base), "--tuned", str(base), "-o", str(tmp_path / "none")]
    assert main(same) == 2
    assert not (tmp_path / "none").exists()
