"""Merging around a 4-bit base, and what the survival report says."""

from __future__ import annotations

import dataclasses
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from learned import attach_learned, expected_warning
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import BaseMismatchError, LorakitWarning, ModelError, RequestError
from lorakit.formats.peft import save_adapter
from lorakit.math.survival import survival
from lorakit.merging.four_bit import recommendation
from lorakit.merging.run import MergeRequest, merge_to_disk
from lorakit.methods.registry import build_method
from lorakit.models.load import load_base_model
from lorakit.models.nf4 import quantization_of
from lorakit.weights.nf4 import round_trip


def adapter_on_nf4(path: Path, architecture: str = "llama", size: float = 0.2) -> Any:
    """A base and an adapter learned beside its 4-bit weights; the live outputs and the inputs."""
    tiny_models.build(architecture).save_pretrained(path / "base", max_shard_size="40KB")
    model = load_base_model(path / "base", "nf4", device="cpu")
    given = tiny_models.inputs(model)
    attach_learned(model, LoraSpec(r=3, alpha=7.5, targets="all-linear"), size=size)
    save_adapter(model, path / "adapter")
    return tiny_models.outputs(model, given), given


def _other_rounding(onto: str) -> AbstractContextManager[object]:
    return expected_warning("trained beside nf4" if onto == "dense" else None)


def request(path: Path, **options: Any) -> MergeRequest:
    return MergeRequest(
        adapter=path / "adapter", output=path / "merged", base=str(path / "base"), **options
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_onto_the_dequantized_weights_gives_the_live_model_dense(
    tmp_path: Path, architecture: str
) -> None:
    live, given = adapter_on_nf4(tmp_path, architecture)
    certificate = merge_to_disk(request(tmp_path, onto="nf4-dequantized"))
    assert certificate["onto"] == "nf4-dequantized"
    merged = load_base_model(tmp_path / "merged", device="cpu")
    assert quantization_of(merged) is None
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-4, atol=1e-4)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_the_default_merges_into_the_original_weights(tmp_path: Path) -> None:
    live, given = adapter_on_nf4(tmp_path)
    with pytest.warns(LorakitWarning, match="trained beside nf4"):
        certificate = merge_to_disk(request(tmp_path))
    assert "requantized" not in certificate
    merged = load_base_model(tmp_path / "merged", device="cpu")
    difference = (tiny_models.outputs(merged, given) - live).abs().max()
    assert difference > 1e-3  # the rounding of the base that the adapter was trained beside


@pytest.mark.parametrize("onto", ["dense", "nf4-dequantized"])
def test_a_requantized_merge_is_in_4_bits_and_reports_what_survived(
    tmp_path: Path, onto: Any
) -> None:
    adapter_on_nf4(tmp_path)
    with _other_rounding(onto):
        certificate = merge_to_disk(request(tmp_path, onto=onto, requantize="nf4"))
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == certificate
    merged = load_base_model(tmp_path / "merged", device="cpu")
    found = quantization_of(merged)
    assert found is not None
    assert found.num_layers == 14
    report = certificate["requantized"]
    assert len(report["layers"]) == 14
    assert all(0.3 < layer["share"] < 1.7 for layer in report["layers"])
    assert report["mean_abs_logit_error"] > 0
    assert "share =" in report["formula"]
    assert report["recommendation"]


def test_a_small_change_is_rounded_away_on_the_levels_and_not_between_them() -> None:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(256, 256)
    delta = 6e-5 * torch.randn(256, 2) @ torch.randn(2, 256)
    levels = round_trip(weight)
    on = survival(round_trip(levels), round_trip(levels + delta), delta)
    between = survival(levels, round_trip(weight + delta), delta)
    assert abs(on.share) < 0.1
    assert 0.7 < between.share < 1.3
    assert between.relative_error > 3 > on.relative_error


def test_the_dequantized_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    adapter_on_nf4(tmp_path)
    torch.manual_seed(99)
    other = tiny_models.build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    wrong = MergeRequest(
        adapter=tmp_path / "adapter",
        output=tmp_path / "merged",
        base=str(tmp_path / "other"),
        onto="nf4-dequantized",
    )
    with pytest.raises(BaseMismatchError):
        merge_to_disk(wrong)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_that_is_stored_in_4_bits_is_merged_into_multiplied_out(
    tmp_path: Path, architecture: str
) -> None:
    live, given = adapter_on_nf4(tmp_path, architecture)
    load_base_model(tmp_path / "base", "nf4", device="cpu").save_pretrained(tmp_path / "stored")
    here = dataclasses.replace(request(tmp_path), base=str(tmp_path / "stored"), any_base=True)
    with pytest.raises(ModelError, match="no dense weight") as caught:
        merge_to_disk(here)
    assert "--onto nf4-dequantized" in (caught.value.remedy or "")
    merge_to_disk(dataclasses.replace(here, onto="nf4-dequantized"))
    merged = load_base_model(tmp_path / "merged", device="cpu")
    assert quantization_of(merged) is None
    assert type(merged) is type(tiny_models.build(architecture))
    torch.testing.assert_close(tiny_models.outputs(merged, given), live, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_a_model_that_cannot_be_read_back_in_4_bits_is_not_written(tmp_path: Path) -> None:
    adapter_on_nf4(tmp_path, "falcon")
    with pytest.raises(RequestError, match="could not read this model back"):
        merge_to_disk(request(tmp_path, requantize="nf4"))
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
    live = merge_to_disk(request(tmp_path, onto="nf4-dequantized"))
    assert live["max_abs_logit_error"] <= live["tolerance"]


@pytest.mark.parametrize("options", [{"onto": "nf4-dequantized"}, {"requantize": "nf4"}])
def test_methods_without_low_rank_factors_are_refused_around_4_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tiny_models.build("gpt2")
    model.save_pretrained(tmp_path / "base")
    method = build_method("bitfit", {})
    method.attach(model)
    method.save(model, tmp_path / "adapter", {})
    with pytest.raises(RequestError, match="only low-rank adapters"):
        merge_to_disk(request(tmp_path, **options))
    assert not (tmp_path / "merged").exists()


def test_the_recommendation_follows_the_error() -> None:
    assert "can take" in recommendation(0.1)
    assert "evaluate" in recommendation(0.4)
    assert "do not use" in recommendation(1.3)
