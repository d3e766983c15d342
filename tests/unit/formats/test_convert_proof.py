"""What was written is compared with what it was made from: every change, and nothing dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from learned import attach_learned
from lorakit import converting
from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.converting import ConvertOptions, convert
from lorakit.errors import WorkError
from lorakit.formats.compared import differences
from lorakit.formats.peft import read_adapter, write_adapter

CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"update": "dora"},
    "bias": {"bias": "lora_only"},
    "override": {"also_train": ("norm",)},
    "factors": {},
}


def saved(tmp_path: Path, name: str = "llama-biased", **spec: Any) -> tuple[str, Path]:
    model = tiny_models.llama_biased() if name == "llama-biased" else tiny_models.build(name)
    model.save_pretrained(tmp_path / "base")
    wanted: dict[str, Any] = {"targets": ("q_proj", "k_proj"), "r": 3, "alpha": 7.5, **spec}
    attach_learned(model, LoraSpec(**wanted))
    adapter_from_model(model).save(tmp_path / "adapter")
    return str(tmp_path / "base"), tmp_path / "adapter"


def spoiled(adapter: Adapter, what: str) -> Adapter:
    """The adapter with one thing of it moved by a thousandth."""
    site = next(iter(adapter.factors))
    factors = dict(adapter.factors)
    if what == "magnitude":
        magnitude = factors[site].magnitude
        assert magnitude is not None
        factors[site] = replace(factors[site], magnitude=magnitude * 1.001)
    if what == "factors":
        factors[site] = replace(factors[site], B=factors[site].B * 1.001)
    biases, overrides = dict(adapter.biases), dict(adapter.overrides)
    for values in [biases] * (what == "bias") + [overrides] * (what == "override"):
        assert values
        name = next(iter(values))
        values[name] = values[name] * 1.001 + 1e-3
    return replace(adapter, factors=factors, biases=biases, overrides=overrides)


@pytest.mark.parametrize("what", CASES)
def test_whatever_is_written_otherwise_is_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = saved(tmp_path, **CASES[what])
    convert(adapter, tmp_path / "fine", "peft", base=base)

    def careless(adapter: Adapter, path: Path, **given: object) -> None:
        write_adapter(spoiled(adapter, what), path)

    monkeypatch.setattr(converting, "write_adapter", careless)
    with pytest.raises(WorkError, match="does not read back"):
        convert(adapter, tmp_path / "made", "peft", base=base)
    assert not (tmp_path / "made").exists()


def factors(A: torch.Tensor, B: torch.Tensor, scaling: float = 2.5) -> Factors:
    return Factors(A=A, B=B, alpha=scaling * A.shape[0], scaling=scaling, kind="linear", module="m")


def adapter_of(**named: Factors) -> Adapter:
    return Adapter(spec=LoraSpec(targets=tuple(named)), factors=named)


def test_the_difference_is_that_of_the_products() -> None:
    """Against the products themselves; other factors of one product are no difference."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    other_A, other_B = (
        torch.randn(4, 7, generator=generator),
        torch.randn(5, 4, generator=generator),
    )
    first = 2.5 * B.double().numpy() @ A.double().numpy()
    second = 0.5 * other_B.double().numpy() @ other_A.double().numpy()
    expected = ((first - second) ** 2).sum() ** 0.5 / (first**2).sum() ** 0.5
    found = differences(adapter_of(m=factors(A, B)), adapter_of(m=factors(other_A, other_B, 0.5)))
    assert found["m"] == pytest.approx(expected, rel=1e-12)
    same = differences(adapter_of(m=factors(A, B)), adapter_of(m=factors(A * 4, B / 8, 5.0)))
    assert same["m"] < 1e-14
    turned = factors(A.flip(0), B.flip(1))
    assert differences(adapter_of(m=factors(A, B)), adapter_of(m=turned))["m"] < 1e-14


def test_nothing_dense_is_formed() -> None:
    """The product of these would take 320 GB."""
    A, B = torch.randn(4, 200_000), torch.randn(200_000, 4)
    found = differences(adapter_of(m=factors(A, B)), adapter_of(m=factors(A * 2, B, 1.25)))
    assert found["m"] < 1e-6


def test_what_one_of_two_lacks_is_a_difference() -> None:
    A, B = torch.randn(3, 7), torch.randn(5, 3)
    both = replace(adapter_of(m=factors(A, B)), overrides={"norm.weight": torch.ones(3)})
    bare = adapter_of(m=factors(A, B))
    assert differences(both, bare)["norm.weight"] == float("inf")
    assert differences(bare, both)["norm.weight"] == float("inf")
    nan = replace(both, overrides={"norm.weight": torch.full((3,), float("nan"))})
    assert not differences(both, nan)["norm.weight"] <= 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["gguf", "mlx", "loralib", "kohya"])
def test_halves_with_several_scalings_are_folded_in_float32(
    to: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, adapter = saved(
        tmp_path, "llama", rank_pattern={"k_proj": 5}, alpha_pattern={"k_proj": 4}
    )
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file)
    record = convert(adapter, tmp_path / "made", to, base=base)
    assert record["max_relative_error"] < 1e-6
    options = ConvertOptions(alpha=record["alpha"] if to == "loralib" else None)
    convert(record["output"], tmp_path / "back", "peft", base=base, options=options)
    before, after = read_adapter(adapter), read_adapter(tmp_path / "back")
    for module in before.modules():
        torch.testing.assert_close(after.delta(module), before.delta(module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_parts_in_halves_with_several_scalings(name: str, tmp_path: Path) -> None:
    spec = {"targets": "qv", "r": 3, "rank_pattern": {"v": 5}, "alpha_pattern": {"v": 4}}
    base, adapter = saved(tmp_path, name, **spec)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    record = convert(adapter, tmp_path / "made", "peft", base=base)
    assert record["max_relative_error"] < 1e-6
