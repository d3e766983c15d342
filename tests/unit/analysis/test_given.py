"""What may be given to an analysis, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from lorakit.adapters.attach import attach, detach
from lorakit.adapters.spec import LoraSpec
from lorakit.analysis.options import AnalyzeOptions
from lorakit.analysis.page import middle_sites, page
from lorakit.analysis.run import analyze
from lorakit.analysis.updates import Base
from lorakit.errors import AdapterFileError, BaseMismatchError, RequestError
from lorakit.formats.peft import save_adapter
from lorakit.report.layer_figures import short_names

TENSORS = "adapter_model.safetensors"


def _from_peft(architecture: str, path: Path, *, seed: int = 1, **config: object) -> Path:
    """An adapter that PEFT made, every number of it random."""
    model = peft.get_peft_model(tiny_models.build(architecture), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(path))
    return path


@pytest.fixture
def path(tmp_path):
    return _from_peft(
        "llama", tmp_path / "a", r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]
    )


def _changed(path: Path, ending: str, number: float) -> None:
    tensors = load_file(path / TENSORS)
    for name in tensors:
        if name.endswith(ending):
            tensors[name][..., 0] = number
    save_file(tensors, path / TENSORS)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(path, number):
    _changed(path, "layers.1.self_attn.v_proj.lora_A.weight", number)
    with pytest.raises(
        AdapterFileError, match=r"not finite: model\.layers\.1\.self_attn\.v_proj A"
    ):
        analyze([path])


def test_nothing_is_loaded_for_what_cannot_be_measured(path, tmp_path):
    other = _from_peft("gpt2", tmp_path / "b", r=2, target_modules=["c_fc"], fan_in_fan_out=True)

    def load() -> Base:
        pytest.fail("the base was loaded")

    with pytest.raises(RequestError, match="no site in common"):
        analyze([path, other], base=load)
    with pytest.raises(RequestError, match="cannot be measured"):
        analyze([path], AnalyzeOptions(measures=("agreement",)), base=load)
    with pytest.raises(RequestError, match="no site of this adapter"):
        analyze([path], AnalyzeOptions(sites=("c_attn",)), base=load)
    for seed in (-1, 2**63):
        with pytest.raises(RequestError, match="seed"):
            AnalyzeOptions(seed=seed)
    found = analyze([path], base=lambda: Base(tiny_models.build("llama")))
    assert all(site.amplification for site in found.sites)


def test_two_adapters_of_different_bases_are_refused_without_a_base_too(tmp_path):
    for seed in (0, 1):
        model = tiny_models.build("llama", seed=seed)
        attach(model, LoraSpec(r=2, targets="qv"))
        save_adapter(model, tmp_path / str(seed))
        detach(model)
    paths = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(BaseMismatchError, match="different base"):
        analyze(paths)
    assert len(analyze(paths, AnalyzeOptions(any_base=True)).agreement) == 4


def test_foreign_adapters_that_name_different_bases_are_told_apart(path, tmp_path):
    other = _from_peft("llama", tmp_path / "b", r=2, target_modules=["q_proj"])
    for where, name in ((path, "mine/one"), (other, "mine/two")):
        config = json.loads((where / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name
        (where / "adapter_config.json").write_text(json.dumps(config))
    notes = analyze([path, other]).notes
    assert "the adapters do not name the same base: a names mine/one, b names mine/two" in notes
    assert "of a not in the other adapter: 2, the first is model.layers.0.self_attn.v_proj" in notes


def test_an_update_that_is_zero_is_beside_as_many_directions_as_its_rank(path):
    _changed(path, "lora_B.weight", 0.0)
    tensors = {n: t * ("lora_A" in n) for n, t in load_file(path / TENSORS).items()}
    save_file(tensors, path / TENSORS)
    base = Base(tiny_models.build("llama"))
    found = analyze([path], base=base)
    for site in found.sites:
        amplified = site.amplification
        assert amplified is not None
        weight = base.model.get_submodule(site.site).weight.detach().double().numpy()
        own = np.linalg.svd(weight, compute_uv=False)[:3]
        assert (amplified.r, amplified.of_update, amplified.factor) == (3, 0.0, None)
        assert amplified.of_base == pytest.approx(np.linalg.norm(own), rel=1e-5)
    assert "NaN" not in json.dumps(found.to_json())


def test_the_tiles_say_each_adapter_by_itself(path, tmp_path):
    other = _from_peft("llama", tmp_path / "b", seed=2, r=2, target_modules=["q_proj"])
    found = analyze([path, other], base=Base(tiny_models.build("llama")))
    tiles = {tile["label"]: tile["value"] for tile in page(found)["tiles"]}
    for label in ("a", "b"):
        factors = [s.amplification.factor for s in found.sites if s.adapter == label]
        assert len(factors) % 2 == 0
        assert tiles[f"{label}: amplification"] == f"{median(factors):.4g}"
        new = sum(len(s.intruders.positions) for s in found.sites if s.adapter == label)
        assert tiles[f"{label}: intruder dimensions"] == str(new)


def test_an_encoder_and_a_decoder_are_kinds_of_their_own():
    sites = [
        f"{stack}.block.{k}.layer.0.SelfAttention.q"
        for stack in ("encoder", "decoder")
        for k in range(2)
    ]
    assert list(short_names([*sites, "lm_head"]).values()) == [
        "encoder q", "encoder q", "decoder q", "decoder q", "lm_head",
    ]  # fmt: skip
    assert middle_sites(sites, 4) == [sites[1], sites[3]]
    assert set(short_names(sites[:2]).values()) == {"q"}


def test_chance_is_drawn_for_every_size_of_the_weights(tmp_path):
    """Random directions in the 16 outputs of k share more than in the 32 of q."""
    targets = {"target_modules": ["q_proj", "k_proj"]}
    paths = [_from_peft("llama", tmp_path / str(r), seed=r, r=r, **targets) for r in (2, 3)]
    found = analyze(paths, AnalyzeOptions(of="B"))
    assert {(s.site.rpartition(".")[2], s.d) for s in found.subspaces} == {
        ("q_proj", 32),
        ("k_proj", 16),
    }
    drawings = {s["title"]: s.get("svg", "") for s in page(found)["sections"]}
    for d in (16, 32):
        assert f"Gaussian, d = {d}" in drawings["Subspaces in common"]
        assert f"chance, d = {d}" in drawings["All directions of each weight"]
