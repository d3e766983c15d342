"""Adapters on experts one by one, as PEFT saved them beside transformers 4, as stacked ones.

transformers 4 had a module per expert (`experts.3.gate_proj`, Mixtral's
`block_sparse_moe.experts.3.w1`), transformers 5 has one parameter for all: `experts.gate_up_proj`
(E, 2 inside, hidden), its first half the gate's, and `experts.down_proj` (E, hidden, inside). Gate
and up become one update of their joint rank: A stacked, B block-wise. An expert or a half that was
not adapted gets zeros, and so do the ranks that an expert has less than another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError
from lorakit.formats.foreign import pairs_of
from lorakit.formats.peft_config import peft_pattern
from lorakit.layers.kinds import kind_of
from lorakit.math.scaling import Scaling, alpha_for, lora_scaling

PREFIX = "base_model.model."
ENDINGS = (".lora_A.weight", ".lora_B.weight")
_EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)$")
_OLD_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
# A leaf of one expert -> the parameter that holds it, and which part of its rows.
_PLACES = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
_NUM_PARTS = {"gate_up_proj": 2, "down_proj": 1}


@dataclass(frozen=True, slots=True)
class _Update:
    """One expert's own update of one part: A (r, in), B (rows, r), and its scaling."""

    name: str
    expert: int
    A: Tensor
    B: Tensor
    scaling: float


# Layer's experts -> parameter -> part -> the updates of its experts.
_Layers = dict[str, dict[str, dict[int, list[_Update]]]]


def one_by_one(keys: list[str], model: nn.Module) -> list[str]:
    """The adapted modules that are single experts of what the base holds stacked.

    Args:
        keys: names of an adapter's tensors.
        model: the base, with or without weights.
    """
    modules = base_modules(model)
    names = dict.fromkeys(_module_of(key) for key in keys if key.endswith(ENDINGS))
    return [name for name in names if _stack_of(name, modules) is not None]


def stack_experts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, where: Path
) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """The adapter on stacked expert weights, in the layout of PEFT 0.19.

    Args:
        tensors: of the adapter, by PEFT's names.
        config: its adapter_config.json.
        model: the base, with or without weights.
        where: the file, for errors.

    Returns:
        Tensors, configuration, and how many updates were stacked.

    Raises:
        AdapterFileError: experts the base does not have, or other shapes.
    """
    modules = base_modules(model)
    pairs = pairs_of(tensors, ENDINGS, where)
    stackable = {key for key in pairs if _stack_of(_module_of(key), modules) is not None}
    layers: _Layers = {}
    for key in stackable:
        owner, parameter, part, update = _update_of(key, pairs[key], config, modules)
        layers.setdefault(owner, {}).setdefault(parameter, {}).setdefault(part, []).append(update)
    result = {
        key.replace(_OLD_BLOCK, _BLOCK): tensor
        for key, tensor in tensors.items()
        if _without_ending(key) not in stackable
    }
    sizes: dict[str, tuple[int, float]] = {}
    for owner, parameters in layers.items():
        for parameter, parts in parameters.items():
            A, B, scaling = _stacked(
                parts, modules[owner].get_parameter(parameter), parameter, where
            )
            # PEFT wraps one parameter of a module in the other: the later one is outside.
            nested = ".base_layer" * (parameter == "gate_up_proj" and "down_proj" in parameters)
            num, r = A.shape[:2]
            result[f"{PREFIX}{owner}{nested}{ENDINGS[0]}"] = A.flatten(0, 1)
            result[f"{PREFIX}{owner}{nested}{ENDINGS[1]}"] = B.permute(1, 2, 0).reshape(-1, r * num)
            sizes[f"{owner}.{parameter}"] = (r, scaling)
    others = [_module_of(key).replace(_OLD_BLOCK, _BLOCK) for key in pairs if key not in stackable]
    return result, _config(config, sizes, others, modules, where), len(stackable)


def _without_ending(key: str) -> str:
    for ending in ENDINGS:
        key = key.removesuffix(ending)
    return key


def _module_of(key: str) -> str:
    return _without_ending(key).removeprefix(PREFIX)


def _stack_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module that holds an expert stacked; None where the base has the expert itself."""
    found = _EXPERT.match(name)
    if found is None or found["leaf"] not in _PLACES or name in modules:
        return None
    owner = found["owner"].replace(_OLD_BLOCK, _BLOCK)
    parameter = getattr(modules.get(owner), _PLACES[found["leaf"]][0], None)
    return owner if isinstance(parameter, Tensor) and parameter.ndim == 3 else None


def _update_of(
    key: str,
    pair: tuple[Tensor, Tensor],
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
) -> tuple[str, str, int, _Update]:
    """Where an update belongs, and the update."""
    name = _module_of(key)
    owner, found = _stack_of(name, modules), _EXPERT.match(name)
    assert owner is not None and found is not None  # noqa: PT018  the caller asked before
    parameter, part = _PLACES[found["leaf"]]
    A, B = pair
    alpha = peft_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    scaling = lora_scaling(float(alpha), A.shape[0], _rule(config))
    return owner, parameter, part, _Update(name, int(found["expert"]), A, B, scaling)


def _rule(config: Mapping[str, Any]) -> Scaling:
    return "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"


def _stacked(
    parts: Mapping[int, list[_Update]], weight: Tensor, parameter: str, where: Path
) -> tuple[Tensor, Tensor, float]:
    """A (E, r, in), B (E, out, r) and the one scaling of a parameter's update."""
    num, out, into = weight.shape
    rows = out // _NUM_PARTS[parameter]
    updates = [update for part in parts.values() for update in part]
    scalings = [update.scaling for update in updates]
    scaling = max(scalings, key=scalings.count)
    ranks = {part: max(u.A.shape[0] for u in found) for part, found in parts.items()}
    whole = sum(ranks.values())
    folded = torch.float32 if len(set(scalings)) > 1 else updates[0].B.dtype
    A = torch.zeros(num, whole, into, dtype=updates[0].A.dtype)
    B = torch.zeros(num, out, whole, dtype=torch.promote_types(updates[0].B.dtype, folded))
    start = 0
    for part in sorted(parts):
        for update in parts[part]:
            _check(update, (num, rows, into), where)
            columns = slice(start, start + update.A.shape[0])
            A[update.expert, columns] = update.A
            B[update.expert, part * rows : (part + 1) * rows, columns] = (
                update.B.double() * (update.scaling / scaling)
            ).to(B.dtype)
        start += ranks[part]
    return A, B, scaling


def _check(update: _Update, shape: tuple[int, int, int], where: Path) -> None:
    num, rows, into = shape
    r = update.A.shape[0]
    if update.expert >= num:
        raise AdapterFileError(
            "the file has updates of experts that the base does not have",
            where=str(where),
            expected=f"{num} experts",
            found=update.name,
            remedy="is --base right?",
        )
    if (tuple(update.A.shape), tuple(update.B.shape)) != ((r, into), (rows, r)):
        raise AdapterFileError(
            "an update has other shapes than the base's experts",
            where=f"{where}: {update.name}",
            expected=f"A {(r, into)}, B {(rows, r)}",
            found=f"A {tuple(update.A.shape)}, B {tuple(update.B.shape)}",
            remedy="is --base right?",
        )


def _config(
    config: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, float]],
    others: list[str],
    modules: Mapping[str, nn.Module],
    where: Path,
) -> dict[str, Any]:
    """The configuration of the stacked adapter.

    Args:
        config: of the adapter on single experts.
        sizes: adapted parameter -> rank and scaling.
        others: the adapted modules that are no experts, and routers.
        modules: the base's.
        where: the file, for errors.
    """
    rule = _rule(config)
    routers = [n for n in others if n in modules and kind_of(modules[n]) is None]
    linear = [n for n in others if n not in routers]
    taken = [name for name in linear if name.rpartition(".")[2] in _PLACES]
    if taken:
        raise AdapterFileError(
            "PEFT takes projections of these names for parts of the stacked experts",
            where=str(where),
            found=", ".join(taken[:4]) + (" ..." if len(taken) > 4 else ""),
            remedy="merge the adapter beside a transformers 4 base, and use the merged model",
        )
    ends = _shortest(sizes, modules)
    ranks = _by_end({name: r for name, (r, _) in sizes.items()}, ends)
    alphas = _by_end(
        {name: alpha_for(scaling, r, rule) for name, (r, scaling) in sizes.items()}, ends
    )
    return {
        **config,
        "peft_version": "0.19.0",
        "target_modules": linear,
        "target_parameters": [*ends, *(f"{name}.weight" for name in routers)],
        "rank_pattern": {**ranks, **_still_meant(config.get("rank_pattern"), others)},
        "alpha_pattern": {**alphas, **_still_meant(config.get("alpha_pattern"), others)},
    }


def _by_end(values: Mapping[str, float], ends: list[str]) -> dict[str, float]:
    """Values by the ends of names, where all names of an end have the same."""
    found = {end: {v for name, v in values.items() if name.endswith(end)} for end in ends}
    same = all(len(those) == 1 for those in found.values())
    return {end: those.pop() for end, those in found.items()} if same else dict(values)


def _still_meant(pattern: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any]:
    """The entries of a pattern that mean one of these modules."""
    return {
        key: value
        for key, value in (pattern or {}).items()
        if any(peft_pattern({key: True}, name, False) for name in names)
    }


def _shortest(names: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[str]:
    """The ends of names that mean exactly these parameters; else the names."""
    ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    meant = {
        f"{module}.{own}"
        for module, found in modules.items()
        for own, _ in found.named_parameters(recurse=False)
        if any(f".{module}.{own}".endswith(f".{end}") for end in ends)
    }
    return list(ends) if meant == set(names) else list(names)
