"""A fine-tuned model as an adapter: what it holds, what it leaves out, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import tiny_models
from learned import attach_learned
from lorakit.adapters.attach import detach
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.cli.main import main
from lorakit.composing.extract import extract, extract_with_report
from lorakit.errors import LorakitWarning, ModelError, SpecError
from lorakit.formats.peft import load_adapter
from lorakit.models.load import load_base_model


def saved(model: PreTrainedModel, path: Path, **options: object) -> Path:
    model.save_pretrained(path, **options)
    return path


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
    model = tiny_models.build(name)
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
    extract(base, tuned, 4, also_train=("embed_tokens",)).save(tmp_path / "adapter")
    load_adapter(load_base_model(base), tmp_path / "adapter")


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
    with pytest.raises(ModelError, match=r"wte.weight: \(40, 32\) and \(44, 32\)"):
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
