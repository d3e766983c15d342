"""PEFT's updates of parameters in its file: `target_parameters`, `trainable_token_indices`.

A parameter (E, d1, d2) has A (E r, in) and B (out, r E), seen as (E, r, in) and (out, r, E). PEFT
wraps the parameters of one module in each other, in the module's own order: the first one's keys
have a `.base_layer` for every later one. A token's new row is a row of
`<module>.token_adapter.trainable_tokens_delta`, which holds whole rows in spite of its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.parameters import stacked_parameters
from lorakit.adapters.spec import LoraSpec
from lorakit.adapters.targets import matches
from lorakit.adapters.token_rows import TokenRows
from lorakit.formats.peft_parts import FACTOR_DTYPES

TOKENS = ".token_adapter.trainable_tokens_delta"
_NESTED = ".base_layer"
# Parameters that classes of experts hold, in the order that every class has them.
_ORDER = ("gate_up_proj", "down_proj")
_TURNED_AROUND = (0, 19)


def parameter_pairs(
    pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Which of a file's updates are of parameters.

    Args:
        pairs: name in the file -> its tensors.
        config: adapter_config.json.

    Returns:
        Name in the file -> the parameter's name, and what is wrong.
    """
    targets = [str(key) for key in config.get("target_parameters") or ()]
    owners: dict[str, list[str]] = {}
    for name in pairs:
        owner = re.sub(rf"(?:\{_NESTED})+$", "", name)
        if any(_is_of(owner, key, config) for key in targets):
            owners.setdefault(owner, []).append(name)
    found: dict[str, str] = {}
    problems = [
        f"missing: {key} of target_parameters: the file has no update of it"
        for key in targets
        if not any(_is_of(owner, key, config) for owner in owners)
    ]
    for owner, names in owners.items():
        meant = {key.rpartition(".")[2] for key in targets if _is_of(owner, key, config)}
        leaves = _in_order(meant)
        if leaves is None or len(leaves) != len(names):
            why = "" if leaves else ", whose order only the model's class knows"
            problems.append(
                f"extra: {owner}: {len(names)} updates, and target_parameters names "
                f"{', '.join(sorted(meant))}{why}"
            )
            continue
        # The deepest key is the first parameter's.
        deepest_first = sorted(names, key=len, reverse=True)
        found.update({n: f"{owner}.{leaf}" for n, leaf in zip(deepest_first, leaves, strict=True)})
    return found, problems


def _is_of(owner: str, key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key of target_parameters may mean a parameter of this module.

    PEFT writes bare names (`down_proj`) where it made them of target_modules itself: these are of
    every module that is none of the targeted ones.
    """
    end = key.rpartition(".")[0]
    if end:
        return _ends(owner, end)
    if any(
        _ends(owner, str(k).rpartition(".")[0]) for k in config["target_parameters"] if "." in k
    ):
        return False
    targets = config.get("target_modules") or ()
    targets = (targets,) if isinstance(targets, str) else targets
    return not any(matches(str(target), owner) for target in targets)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _in_order(leaves: set[str]) -> list[str] | None:
    """The parameters of one module as PEFT met them; None where only the model could tell."""
    if len(leaves) > 1 and not leaves <= set(_ORDER):
        return None
    return sorted(leaves, key=lambda leaf: _ORDER.index(leaf) if leaf in _ORDER else 0)


def parameter_factors(
    parameter: str,
    pair: Mapping[str, Tensor],
    spec: LoraSpec,
    *,
    sizes: tuple[int, float],
    config: Mapping[str, Any],
) -> dict[str, Factors] | str:
    """The factors of every matrix that a parameter stacks, or what is wrong with them.

    Args:
        parameter: its name.
        pair: A and B as the file has them.
        spec: for the scaling's rule.
        sizes: rank and alpha.
        config: PEFT's version tells the layout.
    """
    A, B, (r, alpha) = pair["A"], pair["B"], sizes
    if set(pair) != {"A", "B"}:
        return f"extra: {parameter}: a parameter has lora_A and lora_B alone"
    if not all(value.dtype in FACTOR_DTYPES for value in (A, B)):
        return f"misshapen: {parameter}: {A.dtype}, {B.dtype}, not float32, float16 or bfloat16"
    whole = A.ndim == B.ndim == 2 and A.numel() > 0 and A.shape[0] % r == 0
    if not whole or B.shape[1] != A.shape[0]:
        return f"misshapen: {parameter}: rank {r}, but A {tuple(A.shape)}, B {tuple(B.shape)}"
    num = A.shape[0] // r
    by_expert, columns = A.reshape(num, r, -1), B.reshape(B.shape[0], r, num)
    names = [f"{parameter}.{e}" for e in range(num)]
    return {
        name: Factors(
            A=by_expert[e],
            B=columns[:, :, e].contiguous(),
            alpha=alpha,
            scaling=spec.scale(r=r, alpha=alpha),
            kind="conv1d" if _is_old(config) else "linear",
            module=name,
            stack=num,
        )
        for e, name in enumerate(names)
    }


def _is_old(config: Mapping[str, Any]) -> bool:
    """Whether PEFT's version, which began to write itself into the file in 0.18, is before 0.19."""
    numbers = [int(n) for n in re.findall(r"\d+", str(config.get("peft_version") or ""))[:2]]
    return tuple(numbers) < _TURNED_AROUND


def stored_parameters(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """The tensors of all stacked parameters, and each one's rank and scaling.

    Matrices that the adapter does not change, and ranks that one has less than another, are zero.
    """
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    owned: dict[str, set[str]] = {}
    found = stacked_parameters(adapter)
    for parameter in found:
        owner, _, leaf = parameter.rpartition(".")
        owned.setdefault(owner, set()).add(leaf)
    for parameter, parts in found.items():
        owner, _, leaf = parameter.rpartition(".")
        order = _in_order(owned[owner]) or sorted(owned[owner])
        name = owner + _NESTED * (len(order) - 1 - order.index(leaf))
        A, B, scaling = _stacked(list(parts.values()))
        num, r = A.shape[:2]
        sizes[parameter] = (r, scaling)
        tensors[f"{name}.lora_A.weight"] = A.flatten(0, 1)
        tensors[f"{name}.lora_B.weight"] = B.permute(1, 2, 0).reshape(-1, r * num)
    return tensors, sizes


def _stacked(parts: Sequence[Factors]) -> tuple[Tensor, Tensor, float]:
    """A (E, r, in), B (E, out, r) and the one scaling of a parameter."""
    scaling = Counter(part.scaling for part in parts).most_common(1)[0][0]
    r = max(part.r for part in parts)
    num = parts[0].stack or 1
    dtype = reduce(torch.promote_types, (part.B.dtype for part in parts))
    if any(part.scaling != scaling for part in parts):
        dtype = torch.promote_types(dtype, torch.float32)
    A = torch.zeros(
        num,
        r,
        parts[0].A.shape[1],
        dtype=reduce(torch.promote_types, (part.A.dtype for part in parts)),
    )
    B = torch.zeros(num, parts[0].B.shape[0], r, dtype=dtype)
    for part in parts:
        e = int(part.module.rpartition(".")[2])
        A[e, : part.r] = part.A
        same = part.scaling == scaling
        B[e, :, : part.r] = part.B if same else part.B.double() * (part.scaling / scaling)
    return A, B, scaling


def parameter_config(adapter: Adapter, sizes: Mapping[str, object]) -> dict[str, Any]:
    """What the configuration says of parameters and tokens.

    Args:
        adapter: what is written.
        sizes: the adapted parameters.
    """
    own: dict[str, Any] = {"trainable_token_indices": _token_indices(adapter)}
    if not sizes:
        return {**own, "target_parameters": None}
    kept = [str(key) for key in adapter.config.get("target_parameters") or ()]
    alike = kept and all(any(_ends(name, key) for key in kept) for name in sizes)
    own["target_parameters"] = kept if alike else list(sizes)
    old = any(f.kind == "conv1d" for f in adapter.factors.values() if f.stack is not None)
    if _is_old(adapter.config) and not old:
        own["peft_version"] = "0.19.0"
    return own


def _token_indices(adapter: Adapter) -> list[int] | dict[str, list[int]] | None:
    if not adapter.tokens:
        return None
    indices = {name: list(tokens.indices) for name, tokens in adapter.tokens.items()}
    given = adapter.config.get("trainable_token_indices")
    # A list means the input embedding, which only the model knows by its name.
    if isinstance(given, list) and list(indices.values()) == [given]:
        return given
    if isinstance(given, dict) and len(given) == len(indices):
        named = {key: tokens for key in given for n, tokens in indices.items() if _ends(n, key)}
        if named == given:
            return given
    return indices


def token_rows(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, TokenRows], list[str]]:
    """The rows of tokens that a file replaces, and what is wrong with them.

    Args:
        tensors: module -> rows.
        config: adapter_config.json, which has the tokens.
    """
    given = config.get("trainable_token_indices") or {}
    found: dict[str, TokenRows] = {}
    problems: list[str] = []
    for module, rows in tensors.items():
        indices = given
        if isinstance(given, dict):
            indices = next((value for key, value in given.items() if _ends(module, str(key))), [])
        if not _are_tokens(indices) or rows.ndim != 2 or len(indices) != rows.shape[0]:
            problems.append(
                f"misshapen: {module}: rows {tuple(rows.shape)} for the tokens {indices!r} of "
                "trainable_token_indices"
            )
        elif rows.dtype not in FACTOR_DTYPES:
            problems.append(f"misshapen: {module}: rows of {rows.dtype}, not floating point")
        else:
            found[module] = TokenRows(tuple(indices), rows)
    if given and not tensors:
        problems.append("missing: trainable_token_indices: the file has no rows of tokens")
    return found, problems


def _are_tokens(indices: object) -> bool:
    if not isinstance(indices, list):
        return False
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices)
    return whole and len(set(indices)) == len(indices)
