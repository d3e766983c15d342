"""PEFT's two layouts of adapters on stacked expert weights (`target_parameters`), one to the other.

An expert parameter has the shape (E, d1, d2). PEFT stores A as (E r, in) and B as (out, r E), seen
as (E, r, in) and (out, r, E). Up to 0.18, in was d1 and out d2 for every model:
D[e] = (B_e A_e)^T. From 0.19 on, in is d2 and out d1 unless the experts' class says that it is
transposed: D[e] = B_e A_e. The change is the same with A'[e] = B[e]^T and B'[e] = A[e]^T: no number
changes, they only move. Experts one by one, as transformers 4 had them, are stacked first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError, WorkError
from lorakit.files import read_json, write_json
from lorakit.formats.foreign import pairs_of
from lorakit.formats.peft_config import CONFIG_NAME
from lorakit.formats.peft_expert_stacks import ENDINGS, PREFIX, one_by_one, stack_experts
from lorakit.formats.peft_tensors import TENSORS_NAME, read_tensors

Layout = Literal["peft-0.18", "peft-0.19"]
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
        How many updates were moved, stayed, and were stacked.

    Raises:
        AdapterFileError: shapes that are neither layout's, one factor without the other.
        WorkError: what was written does not read back as what it was made from.
    """
    file = path / TENSORS_NAME
    config = read_json(path / CONFIG_NAME)
    tensors = read_tensors(path)
    stacked = 0
    if one_by_one(list(tensors), model):
        tensors, config, stacked = stack_experts(tensors, config, model, file)
    modules = base_modules(model)
    result = dict(tensors)
    ranks: dict[str, int] = {}
    stayed = 0
    for key, (A, B) in pairs_of(tensors, ENDINGS, file).items():
        module = _NESTED.sub("", key.removeprefix(PREFIX))
        shapes = _expert_shapes(modules.get(module))
        if not shapes:
            continue
        transposed = bool(getattr(modules[module], "is_transposed", False))
        fits, r = _layouts(A, B, shapes, where=f"{file}: {key}")
        present = _present(fits, config, transposed=transposed)
        wanted = "first" if transposed or to == "peft-0.18" else "last"
        if present == wanted:
            stayed += 1
            continue
        ranks[key] = r
        result[f"{key}{ENDINGS[0]}"], result[f"{key}{ENDINGS[1]}"] = _turned(A, B, r)
    if not ranks and not stayed:
        raise AdapterFileError(
            "no update of stacked expert weights was found",
            where=str(file),
            remedy="is --base right?",
        )
    config = {**config, "peft_version": "0.18.1" if to == "peft-0.18" else "0.19.0"}
    contiguous = {name: tensor.contiguous() for name, tensor in result.items()}
    save_file(contiguous, str(output / TENSORS_NAME), metadata={"format": "pt"})
    write_json(output / CONFIG_NAME, dict(sorted(config.items())))
    _prove(tensors, read_tensors(output), ranks)
    return {"moved": len(ranks), "as_they_were": stayed, "stacked": stacked, "layout": to}


def _prove(
    before: Mapping[str, Tensor], written: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> None:
    """Turn what was moved back, and compare every tensor bit for bit.

    Raises:
        WorkError: one is not what it was made from.
    """
    again = dict(written)
    for key, r in ranks.items():
        names = [f"{key}{ending}" for ending in ENDINGS]
        again[names[0]], again[names[1]] = _turned(written[names[0]], written[names[1]], r)
    wrong = [n for n in before if n not in again or not again[n].equal(before[n])]
    if wrong or again.keys() != before.keys():
        raise WorkError(
            "what was written does not read back as what it was made from",
            where=wrong[0] if wrong else str(sorted(again.keys() - before.keys())[0]),
            expected="the same numbers",
            found=f"{len(wrong)} other tensors",
        )


def _expert_shapes(module: nn.Module | None) -> list[tuple[int, int, int]]:
    if module is None:
        return []
    own = [tuple(p.shape) for _, p in module.named_parameters(recurse=False)]
    return [(s[0], s[1], s[2]) for s in own if len(s) == 3]


def _layouts(
    A: Tensor, B: Tensor, shapes: list[tuple[int, int, int]], *, where: str
) -> tuple[set[str], int]:
    """Which layouts these shapes fit ("first" where in is d1, "last" where in is d2), and the rank.

    Every expert weight of a module has as many experts, so that the rank is the same for all.
    """
    fits: set[str] = set()
    r = A.shape[0] // shapes[0][0]
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
            expected=" or ".join(
                f"A ({num} r, {one}), B ({other}, {num} r)"
                for num, first, last in shapes
                for one, other in ((first, last), (last, first))
            ),
            found=f"A {tuple(A.shape)}, B {tuple(B.shape)}",
            remedy="is --base right?",
        )
    return fits, r


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
