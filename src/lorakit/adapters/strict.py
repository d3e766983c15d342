"""What keeps an adapter from binding: everything is looked at, and everything is listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.targets import matches
from lorakit.errors import AdapterFileError
from lorakit.layers.kinds import kind_of

_SHOWN = 6
_WIDE_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def bias_problems(modules: Mapping[str, nn.Module], biases: Mapping[str, Tensor]) -> list[str]:
    """Trained biases that have no place in the model."""
    problems: list[str] = []
    for name, bias in biases.items():
        module = modules.get(name)
        own = dict(module.named_parameters(recurse=False)).get("bias") if module else None
        if own is None:
            problems.append(f"extra: {name}.bias: the model has no such bias")
        elif own.shape != bias.shape:
            problems.append(
                f"misshapen: {name}.bias: expected {tuple(own.shape)}, found {tuple(bias.shape)}"
            )
    return problems


def not_finite(adapter: Adapter) -> list[str]:
    """Tensors with a NaN or an infinity."""
    named: list[tuple[str, Tensor]] = []
    for name, factors in adapter.factors.items():
        named += [(f"{name} A", factors.A), (f"{name} B", factors.B)]
        if factors.magnitude is not None:
            named.append((f"{name} magnitude", factors.magnitude))
    named += [*adapter.biases.items(), *adapter.overrides.items()]
    named += [(f"{name} rows of tokens", tokens.rows) for name, tokens in adapter.tokens.items()]
    if _all_finite([tensor for _, tensor in named]):
        return []
    return [f"not finite: {name}" for name, t in named if not _is_finite(t)]


def require_finite(adapter: Adapter, path: Path) -> None:
    """Refuse to measure what has a NaN or an infinity.

    Raises:
        AdapterFileError: some tensors are not finite; the first few are named.
    """
    problems = not_finite(adapter)
    if problems:
        raise AdapterFileError(
            "the adapter has numbers that are not finite, and nothing can be measured of them",
            where=str(path),
            found="\n".join(problems[:_SHOWN]),
            remedy="look for the step where its loss became NaN, and take an earlier checkpoint",
        )


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all are finite by their norms, in few operations; False where those cannot tell."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    if any(dtype not in _WIDE_FLOATS for dtype, _ in by_kind):
        return False
    # A NaN or an infinity makes a norm one; so may numbers whose squares are too large.
    norms = (torch.stack(list(torch._foreach_norm(some))) for some in by_kind.values())
    return all(bool(torch.isfinite(found).all()) for found in norms)


def _is_finite(tensor: Tensor) -> bool:
    # Eight-bit floats, which a file may hold, cannot be asked.
    narrow = tensor.is_floating_point() and tensor.itemsize == 1
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


def changed_base(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Weights that a foreign file carries along and that are not this base's own."""
    problems: list[str] = []
    for name, weight in adapter.base_weights.items():
        own = modules[name].get_parameter("weight") if name in modules else None
        if own is not None and own.is_meta:
            continue
        if own is None or own.shape != weight.shape:
            problems.append(f"extra: {name}.base_layer.weight: does not fit the base")
        elif not torch.allclose(own.detach().float().cpu(), weight.float(), rtol=2**-7, atol=1e-6):
            problems.append(f"extra: {name}.base_layer.weight: the file carries a changed weight")
    return problems


def missing_tensors(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Layers that the adapter says it adapts, and for which it brings nothing."""
    missing = _missing_beside(modules, adapter)
    present = set(adapter.modules())
    beside = {name.rpartition(".")[0] for name in adapter.overrides}
    for name, module in modules.items():
        wanted = any(matches(target, name) for target in adapter.target_modules)
        if not wanted or name in present or kind_of(module) is None:
            continue
        if not any(name == b or name.startswith(b + ".") for b in beside):
            missing.append(f"missing: {name}: targeted, but the file has no tensors for it")
    return missing


def missing_ties(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """What PEFT's ensure_weight_tying changes with an embedding, and the file has nothing for."""
    if not adapter.config.get("ensure_weight_tying"):
        return []
    changed = {*adapter.modules(), *(name.removesuffix(".weight") for name in adapter.overrides)}
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf == "weight":
                owners.setdefault(id(parameter), []).append(name)
    problems: list[str] = []
    for names in owners.values():
        tied = [name for name in names if name in changed]
        problems += [
            f"missing: {name}: tied to {tied[0]} (ensure_weight_tying), no tensors for it"
            for name in names
            if tied and name not in changed
        ]
    return problems


def _missing_beside(modules: Mapping[str, nn.Module], adapter: Adapter) -> list[str]:
    """Biases and modules trained beside that the spec names and the file lacks."""
    missing: list[str] = []
    for name in adapter.modules() if adapter.spec.bias != "none" else ():
        module = modules.get(name)
        has_bias = module is not None and "bias" in dict(module.named_parameters(recurse=False))
        if has_bias and name not in adapter.biases:
            missing.append(f"missing: {name}.bias: trained, but the file has no tensor for it")
    for name, module in modules.items():
        if name and any(matches(pattern, name) for pattern in adapter.spec.also_train):
            missing += [
                f"missing: {name}.{n}: trained beside, but the file has no tensor for it"
                for n, _ in module.named_parameters()
                if f"{name}.{n}" not in adapter.overrides
            ]
    return missing
