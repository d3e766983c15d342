"""PEFT's two layouts of adapters on stacked expert weights (`target_parameters`), one to the other.

An expert parameter has the shape (E, d1, d2). PEFT stores A as (E r, in) and B as (out, r E), seen
as (E, r, in) and (out, r, E). Up to 0.18, in was d1 and out d2 for every model:
D[e] = (B_e A_e)^T. From 0.19 on, in is d2 and out d1 unless the experts' class says that it is
transposed: D[e] = B_e A_e. The change is the same with A'[e] = B[e]^T and B'[e] = A[e]^T: no number
changes, they only move.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError
from lorakit.files import read_json, write_json
from lorakit.formats.foreign import read_safetensors
from lorakit.formats.peft_config import CONFIG_NAME, peft_pattern

Layout = Literal["peft-0.18", "peft-0.19"]
_TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_NESTED = re.compile(r"(?:\.base_layer)+$")


def has_experts(path: Path) -> bool:
    """Whether an adapter's directory adapts stacked expert weights."""
    file = path / CONFIG_NAME
    if not file.is_file():
        return False
    try:
        config = read_json(file)
    except ValueError:
        return False
    return isinstance(config, dict) and bool(config.get("target_parameters"))


def convert_experts(path: Path, output: Path, model: nn.Module, to: Layout) -> dict[str, Any]:
    """Rewrite a directory of PEFT in the other layout; tensors that are not experts' stay.

    Args:
        path: an adapter's directory of PEFT.
        output: an existing, empty directory.
        model: the base without weights: its expert parameters' shapes tell the layouts apart.
        to: the layout to write.

    Returns:
        How many updates were moved, and in which layout they were.

    Raises:
        AdapterFileError: shapes that are neither layout's.
    """
    config = read_json(path / CONFIG_NAME)
    tensors = read_safetensors(path / _TENSORS)
    modules = base_modules(model)
    result = dict(tensors)
    moved = stayed = 0
    for key in [k.removesuffix(_ENDINGS[0]) for k in tensors if k.endswith(_ENDINGS[0])]:
        module = _NESTED.sub("", key.removeprefix(_PREFIX))
        shapes = _expert_shapes(modules.get(module))
        if not shapes:
            continue
        A, B = (tensors[f"{key}{ending}"] for ending in _ENDINGS)
        pattern = config.get("rank_pattern") or {}
        r = int(peft_pattern(pattern, module, config.get("r", 8)))
        transposed = bool(modules[module].__dict__.get("is_transposed", False))
        fits = _layouts(A, B, shapes, r, where=f"{path / _TENSORS}: {key}")
        present = _present(fits, config, transposed=transposed)
        wanted = "first" if transposed or to == "peft-0.18" else "last"
        if present == wanted:
            stayed += 1
            continue
        moved += 1
        result[f"{key}{_ENDINGS[0]}"], result[f"{key}{_ENDINGS[1]}"] = _turned(A, B, r)
    if not moved and not stayed:
        raise AdapterFileError(
            "no update of stacked expert weights was found",
            where=str(path / _TENSORS),
            remedy="is --base right?",
        )
    config["peft_version"] = "0.18.1" if to == "peft-0.18" else "0.19.0"
    contiguous = {name: tensor.contiguous() for name, tensor in result.items()}
    save_file(contiguous, str(output / _TENSORS), metadata={"format": "pt"})
    write_json(output / CONFIG_NAME, dict(sorted(config.items())))
    return {"moved": moved, "as_they_were": stayed, "layout": to}


def _expert_shapes(module: nn.Module | None) -> list[tuple[int, int, int]]:
    if module is None:
        return []
    own = [tuple(p.shape) for _, p in module.named_parameters(recurse=False)]
    return [(s[0], s[1], s[2]) for s in own if len(s) == 3]


def _layouts(
    A: Tensor, B: Tensor, shapes: list[tuple[int, int, int]], r: int, *, where: str
) -> set[str]:
    """Which layouts these shapes fit: "first" where in is d1, "last" where in is d2."""
    fits: set[str] = set()
    for num, first, last in shapes:
        if A.shape[0] != num * r or B.shape[1] != num * r:
            continue
        if (A.shape[1], B.shape[0]) == (first, last):
            fits.add("first")
        if (A.shape[1], B.shape[0]) == (last, first):
            fits.add("last")
    if not fits:
        raise AdapterFileError(
            "an update fits no expert weight of the base",
            where=where,
            expected=f"rank {r} of one of {shapes}",
            found=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
            remedy="is --base right?",
        )
    return fits


def _present(fits: set[str], config: Mapping[str, Any], *, transposed: bool) -> str:
    """The file's layout: by shape, and where a weight is square by PEFT's version."""
    if len(fits) == 1:
        return next(iter(fits))
    version = str(config.get("peft_version") or "")
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    if len(numbers) < 2:
        raise AdapterFileError(
            "square expert weights: only PEFT's version tells the layout, and the file has none",
            where=CONFIG_NAME,
            expected="peft_version",
        )
    return "first" if transposed or numbers < [0, 19] else "last"


def _turned(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A'[e] = B[e]^T and B'[e] = A[e]^T, in PEFT's shapes."""
    num = A.shape[0] // r
    by_expert = A.reshape(num, r, A.shape[1])
    columns = B.reshape(B.shape[0], r, num)
    return columns.permute(2, 1, 0).flatten(0, 1), by_expert.permute(2, 1, 0).flatten(1)
