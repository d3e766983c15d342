"""Parts made by PEFT itself, composed, and read by PEFT again: W0 + the sum that numpy computes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from lorakit.adapters.composition.compose import compose_parts
from lorakit.adapters.composition.recipe import Part, Recipe
from lorakit.formats.peft import read_adapter, write_adapter

Deltas = Mapping[str, np.ndarray]

QV: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"q_proj": 3},
}
RS: dict[str, Any] = {
    "r": 6,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj"],
    "layers_to_transform": [1],
}
ALL: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
EMBEDDING: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 3,
    "use_rslora": True,
    "target_modules": ["embed_tokens", "k_proj"],
}
DORA: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "use_dora": True,
    "target_modules": ["q_proj", "embed_tokens"],
}
CONV1D: dict[str, Any] = {"lora_alpha": 8, "fan_in_fan_out": True}
# Architecture, PEFT's configurations, weights.
SETS: dict[str, tuple[str, list[dict[str, Any]], tuple[float, ...]]] = {
    "patterns-rslora": ("llama", [QV, RS], (0.7, 0.3)),
    "three-and-negative": ("llama", [QV, RS, ALL], (0.7, -0.3, 1.0)),
    "embeddings": ("llama", [EMBEDDING, {**ALL, "target_modules": ["embed_tokens"]}], (0.7, 0.3)),
    "conv1d": (
        "gpt2",
        [
            {**CONV1D, "r": 4, "target_modules": ["c_attn"]},
            {**CONV1D, "r": 3, "use_rslora": True, "target_modules": ["c_attn", "c_proj", "wte"]},
        ],
        (0.7, 0.3),
    ),
    "fused": (
        "phi3",
        [
            {**ALL, "target_modules": ["qkv_proj"]},
            {**ALL, "use_rslora": True, "target_modules": ["qkv_proj", "gate_up_proj"]},
        ],
        (0.7, 0.3),
    ),
    "dora": ("llama", [QV, DORA], (0.7, 0.3)),
}
SUMS: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}),
    ("linear", {}),
    ("slerp", {}),
    ("svd", {"r": 3}),
    ("magnitude", {"r": 128, "density": 0.4}),
    ("ties", {"r": 128, "density": 0.4}),
    ("ties", {"r": 3, "density": 0.4}),
]


def made_by_peft(architecture: str, config: dict[str, Any], path: Path, *, seed: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_models.build(architecture), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(path))
    return path


def deltas(architecture: str, path: Path) -> dict[str, np.ndarray]:
    """Parameter -> what PEFT's own merge adds to it."""
    base = tiny_models.build(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(tiny_models.build(architecture), str(path))
        merged = dict(model.merge_and_unload().named_parameters())
    changed = {
        name: (merged[name] - before).detach().double().numpy()
        for name, before in base.named_parameters()
    }
    return {name: change for name, change in changed.items() if np.abs(change).max() > 1e-9}


def trimmed(change: np.ndarray, density: float) -> np.ndarray:
    limit = np.sort(np.abs(change), axis=None)[::-1][math.ceil(density * change.size) - 1]
    return np.where(np.abs(change) >= limit, change, 0.0)


def ties(changes: list[np.ndarray], weights: list[float], total: float) -> np.ndarray:
    weighted = [w * d for w, d in zip(weights, changes, strict=True)]
    elected = np.sign(sum(weighted))
    agreeing = [(np.sign(x) == elected) & (x != 0) for x in weighted]
    above = sum(np.where(a, x, 0.0) for a, x in zip(agreeing, weighted, strict=True))
    below = sum(np.where(a, abs(w), 0.0) for a, w in zip(agreeing, weights, strict=True))
    return total * above / np.where(below > 0, below, 1.0)


def on_the_sphere(one: np.ndarray, two: np.ndarray, t: float) -> np.ndarray:
    cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)


def wanted(how: str, parts: list[Deltas], weights: tuple[float, ...], r: int | None) -> Deltas:
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [(p[name], w) for p, w in zip(parts, weights, strict=True) if name in p]
        mine, own = [d for d, _ in having], [w for _, w in having]
        if how in ("ties", "magnitude"):
            mine = [trimmed(change, 0.4) for change in mine]
        if how == "ties":
            value = ties(mine, own, sum(abs(w) for w in weights))
        elif how == "slerp" and len(mine) == 2:
            value = on_the_sphere(*mine, own[1])
        else:
            value = sum((w * d for d, w in zip(mine, own, strict=True)), np.zeros(()))
        if r is not None:
            left, values, right = np.linalg.svd(value, full_matrices=False)
            value = (left[:, :r] * values[:r]) @ right[:r]
        found[name] = value
    return found


@pytest.mark.parametrize(("how", "options"), SUMS, ids=lambda value: str(value))
@pytest.mark.parametrize("case", SETS)
def test_peft_computes_what_numpy_says(
    case: str, how: str, options: dict[str, Any], tmp_path: Path
) -> None:
    architecture, configs, weights = SETS[case]
    exact_sum = how in ("cat", "linear", "slerp")
    if (case == "dora" and exact_sum) or (how == "slerp" and len(weights) > 2):
        pytest.skip("refused, with a test of its own")
    paths = [
        made_by_peft(architecture, config, tmp_path / f"part{i}", seed=i)
        for i, config in enumerate(configs)
    ]
    named = [
        Part(path.name, read_adapter(path), weight)
        for path, weight in zip(paths, weights, strict=True)
    ]
    base = tiny_models.build(architecture)
    made = compose_parts(named, Recipe(how=how, **options), base=base, quiet=True)
    write_adapter(made.adapter, tmp_path / "made")
    found = deltas(architecture, tmp_path / "made")
    r = options["r"] if options.get("r", 128) < 128 else None
    truth = wanted(how, [deltas(architecture, path) for path in paths], weights, r)
    assert found.keys() == truth.keys()
    for name, change in truth.items():
        assert np.linalg.norm(found[name] - change) < 1e-5 * np.linalg.norm(change), name


@pytest.mark.parametrize("config", [QV, RS, EMBEDDING, DORA], ids=["qv", "rs", "embedding", "dora"])
def test_one_part_at_weight_one_keeps_its_tensors(config: dict[str, Any], tmp_path: Path) -> None:
    path = made_by_peft("llama", config, tmp_path / "part", seed=3)
    part = Part("part", read_adapter(path), 1.0)
    write_adapter(compose_parts([part], Recipe()).adapter, tmp_path / "made")
    before = load_file(path / "adapter_model.safetensors")
    after = load_file(tmp_path / "made" / "adapter_model.safetensors")
    # PEFT writes the frozen embedding along.
    before = {name: value for name, value in before.items() if "base_layer" not in name}
    assert before.keys() == after.keys()
    assert [name for name in before if not before[name].equal(after[name])] == []
    facts = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert facts["use_dora"] == config.get("use_dora", False)
