"""The paper's Table 1: what an adapter costs in one forward pass.

A GPT-2 shape with random weights. For each cell of the paper's grid (batch x sequence x learned
parameters) one process holds the base, LoRA merged and unmerged (q and v), Adapter-L and Adapter-H,
each with the size r that comes nearest to the cell's parameters. Every round times one forward pass
of each, in an order of its own, so that whatever disturbs the machine disturbs all of them; a
round's ratio is a pass over the same round's base. The base is timed twice: the ratio of the second
to the first is the noise. A pass runs without gradient and cache and computes the logits of the
last position only, as a prompt is read.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorakit.errors import ConfigError, RequestError, WorkError
from lorakit.files import write_json
from lorakit.methods.base import Method
from lorakit.methods.registry import build_method
from lorakit.progress import track
from lorakit.train import schema
from lorakit.train.overrides import apply_overrides
from lorakit.train.run import Say

SHAPES = {
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "small": {"n_embd": 256, "n_layer": 6, "n_head": 4},
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
# Batch, sequence, learned parameters; what the paper measured, in ms on a Quadro RTX 8000, and
# what Adapter-L and Adapter-H added, in percent.
CELLS = (
    (32, 512, 0.5e6, {"full": 1449.4, "lin": 2.2, "houlsby": 3.0}),
    (16, 256, 11e6, {"full": 338.0, "lin": 5.0, "houlsby": 8.4}),
    (1, 128, 11e6, {"full": 19.8, "lin": 20.7, "houlsby": 30.3}),
)
WARMUP_ROUNDS = 2
BASE, AGAIN = "full", "full again"
TITLES = {
    BASE: "full fine-tuning",
    AGAIN: "the same again (noise)",
    "lora merged": "LoRA merged",
    "lora unmerged": "LoRA unmerged",
    "lin": "Adapter-L",
    "houlsby": "Adapter-H",
}


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How much of Table 1 is measured, and on what."""

    model: Literal["gpt2-medium", "small", "tiny"] = field(
        default="gpt2-medium", metadata={"help": "the shape; a smaller one gets its share of r"}
    )
    divisor: float = field(default=1.0, metadata={"help": "of the paper's batches; >= 1"})
    rounds: int = field(default=100, metadata={"help": "timed passes of each model; >= 2"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "where it runs"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "of the weights"}
    )
    seed: int = field(default=0, metadata={"help": "of weights, tokens and the order of passes"})

    def __post_init__(self) -> None:
        for name, least in (("divisor", 1), ("rounds", 2)):
            if vars(self)[name] < least:
                raise ConfigError(
                    f"{name} is out of range",
                    where=name,
                    expected=f">= {least}",
                    found=str(vars(self)[name]),
                )

    @classmethod
    def from_overrides(cls, overrides: Iterable[str]) -> LatencySettings:
        """The settings of "key=value"; later ones count.

        Raises:
            ConfigError: an unknown key, or a value that does not fit.
        """
        return schema.read(cls, apply_overrides(cls, {}, list(overrides)))


def num_flops(settings: LatencySettings) -> float:
    """About how many floating-point operations all passes are."""
    params = _count(_empty(settings.model))
    tokens = sum(_batch(cell[0], settings) * cell[1] for cell in CELLS)
    passes = (settings.rounds + WARMUP_ROUNDS) * len(TITLES)
    return 2.0 * params * tokens * passes


def measure(settings: LatencySettings, directory: Path, say: Say) -> dict[str, Any]:
    """Time every cell; a cell that was measured with the same settings is read, not measured.

    Args:
        settings: how much, and on what.
        directory: where each cell is kept.
        say: takes a line for each cell.

    Raises:
        RequestError: CUDA is asked for and there is none.
        WorkError: merged and unmerged LoRA disagree.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "there is no CUDA device", where="device", remedy="use --scale laptop, or device=cpu"
        )
    asked = {**asdict(settings), "threads": torch.get_num_threads()}
    base: GPT2LMHeadModel | None = None
    cells: list[dict[str, Any]] = []
    for number, cell in enumerate(CELLS):
        file = directory / f"cell-{number}.json"
        found = _finished(file, asked)
        if found is None:
            base = base or _base(settings)
            found = {"settings": asked, **_cell(base, cell, settings)}
            write_json(file, found)
        cells.append(found)
        say(f"batch {found['batch']}, {found['length']} tokens: {_ratios(found)}")
    shape = {"name": settings.model, "num_params": _count(_empty(settings.model))}
    return {"settings": asked, "model": {**shape, **SHAPES[settings.model]}, "cells": cells}


def _finished(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("settings") == asked else None


def _ratios(cell: dict[str, Any]) -> str:
    names = ("lora unmerged", "lin", "houlsby")
    return ", ".join(f"{TITLES[name]} {cell['variants'][name]['ratio']:.3f}x" for name in names)


def _batch(of_paper: int, settings: LatencySettings) -> int:
    return max(1, round(of_paper / settings.divisor))


def _cell(
    base: GPT2LMHeadModel, cell: tuple[int, int, float, dict[str, float]], settings: LatencySettings
) -> dict[str, Any]:
    paper_batch, length, budget, paper = cell
    batch = _batch(paper_batch, settings)
    share = _count(base) / _count(_empty("gpt2-medium"))
    # A smaller shape gets the same share of its own parameters.
    variants = _variants(base, budget * share)
    torch.manual_seed(settings.seed)
    ids = torch.randint(base.config.vocab_size, (batch, length), device=base.device)
    difference = _require_agreement(variants, ids[:1])
    label = f"batch {batch}, {length} tokens"
    seconds = _time(variants, ids, rounds=settings.rounds, seed=settings.seed, label=label)
    summary = {name: _summary(name, seconds, settings.seed) for name in seconds}
    return {
        "batch": batch,
        "length": length,
        "budget": round(budget * share),
        "paper": {
            "batch": paper_batch,
            "budget": round(budget),
            "full_ms": paper["full"],
            "lin_percent": paper["lin"],
            "houlsby_percent": paper["houlsby"],
        },
        "merged_logit_difference": difference,
        "variants": {
            name: {"r": variants[name].r, "num_params": variants[name].num_params, **summary[name]}
            for name in summary
        },
    }


@dataclass(frozen=True, slots=True)
class Variant:
    """One model to time."""

    model: GPT2LMHeadModel
    r: int
    num_params: int


def _variants(base: GPT2LMHeadModel, budget: float) -> dict[str, Variant]:
    """All models of a cell; but for the merged one they share the base's tensors."""
    found = {BASE: Variant(base, 0, 0), AGAIN: Variant(base, 0, 0)}
    for name, method_name in (
        ("lora unmerged", "lora"),
        ("lora merged", "lora"),
        ("lin", "lin"),
        ("houlsby", "houlsby"),
    ):
        r = _size_for(base, method_name, budget)
        merged = name == "lora merged"
        model = copy.deepcopy(base) if merged else _sharing(base)
        method = _method(method_name, r)
        # The same seed for both LoRAs: they are one adapter, and must agree.
        torch.manual_seed(1)
        num_params = method.attach(model).num_trainable
        _pretend_learned(method.state(model))
        if merged:
            method.merge(model)
        found[name] = Variant(model.eval(), r, num_params)
    return found


def _method(name: str, r: int) -> Method:
    if name == "lora":
        return build_method("lora", {"r": r, "alpha": 2 * r, "targets": "qv"})
    return build_method(name, {"bottleneck": r})


def _size_for(base: GPT2LMHeadModel, name: str, budget: float) -> int:
    """The r whose count is nearest; every method's count is linear in r."""
    one, two = (_method(name, r).plan(base).num_trainable for r in (1, 2))
    return max(1, round(1 + (budget - one) / (two - one)))


def _sharing(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A second tree of modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _pretend_learned(state: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(state):
            noise = torch.randn(state[name].shape, generator=generator)
            state[name].add_(0.02 * noise.to(state[name].device))


def _forward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def _require_agreement(variants: dict[str, Variant], ids: Tensor) -> float:
    """Merged and unmerged LoRA are one function, and another one than the base; else say so."""
    base, merged, live = (
        _forward(variants[n].model, ids).float() for n in (BASE, "lora merged", "lora unmerged")
    )
    difference = (merged - live).abs().max().item()
    change = (live - base).abs().max().item()
    if not difference < 0.1 * change:
        raise WorkError(
            "merged and unmerged LoRA are not one function",
            expected=f"logits that differ by far less than LoRA changes them, {change:.3g}",
            found=f"{difference:.3g}",
        )
    return difference


def _time(
    variants: dict[str, Variant], ids: Tensor, *, rounds: int, seed: int, label: str
) -> dict[str, list[float]]:
    """Seconds of one pass, by variant and round; all variants in every round, shuffled."""
    synchronise: Callable[[], None] = (
        torch.cuda.synchronize if ids.device.type == "cuda" else lambda: None
    )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(seed)
    for trial in track(range(WARMUP_ROUNDS + rounds), label):
        for name in order.sample(list(variants), len(variants)):
            synchronise()
            started = time.perf_counter()
            _forward(variants[name].model, ids)
            synchronise()
            if trial >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _summary(name: str, seconds: dict[str, list[float]], seed: int) -> dict[str, Any]:
    """The median time, and the median ratio to the same round's base with its spread."""
    ratios = [mine / base for mine, base in zip(seconds[name], seconds[BASE], strict=True)]
    draws = random.Random(seed)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "median_ms": round(1e3 * statistics.median(seconds[name]), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_95": [round(medians[49], 4), round(medians[1949], 4)],
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


def _base(settings: LatencySettings) -> GPT2LMHeadModel:
    torch.manual_seed(settings.seed)
    model = GPT2LMHeadModel(_config(settings.model))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    nn.Module.to(model, device=torch.device(settings.device), dtype=dtype)
    return model.eval()


def _empty(shape: str) -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(_config(shape))


def _config(shape: str) -> GPT2Config:
    config = GPT2Config.from_dict(dict(SHAPES[shape]))
    assert isinstance(config, GPT2Config)
    return config


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
