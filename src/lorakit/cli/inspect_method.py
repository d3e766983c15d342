"""`lorakit inspect` for methods that are not in PEFT's layout: what was learned, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.identity import require_same_base
from lorakit.cli import console
from lorakit.data.task_facts import ClassifyTask, saved_task
from lorakit.errors import ModelError
from lorakit.formatting import format_bytes, format_count, format_number
from lorakit.methods.files import Saved, read_state
from lorakit.methods.full import FullMethod, read_full_state
from lorakit.methods.in_place import base_parameters
from lorakit.models.empty import empty_model
from lorakit.models.load import load_base_model
from lorakit.models.task_head import head_modules


@dataclass(frozen=True, slots=True)
class Learned:
    """One learned tensor.

    Attributes:
        site: its name.
        shape: its shape.
        norm: Frobenius norm of the change; of the tensor itself where the base has none.
        base_norm: norm of the base's tensor; None where the base has none, or was not found.
        is_change: whether `norm` is that of a change.
    """

    site: str
    shape: list[int]
    norm: float
    base_norm: float | None
    is_change: bool


def measure(saved: Saved) -> tuple[list[Learned], str | None]:
    """Norms of everything that was learned; the base is loaded where its values are needed.

    Args:
        saved: the directory.

    Returns:
        One entry per tensor, and why changes could not be measured, or None.

    Raises:
        AdapterFileError: the tensors cannot be read.
        BaseMismatchError: the base that the passport names is another one now.
    """
    if saved.name == FullMethod.name:
        state = read_full_state(load_base_model(saved.path, device="cpu"), saved.path)
    else:
        state = read_state(saved.path)
    try:
        base = _base_values(saved, state)
    except ModelError as error:
        return [_learned(name, value, None) for name, value in state.items()], (
            f"the base cannot be read ({error.what}): norms of the learned tensors, not of changes"
        )
    return [_learned(name, value, base.get(name)) for name, value in state.items()], None


def _base_values(saved: Saved, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if saved.base is None:
        raise ModelError("the passport does not name it")
    task = saved_task(saved.passport, where=str(saved.path))
    if task is not None:
        return _classifier_values(saved, saved.base, task, state)
    known = base_parameters(empty_model(saved.base))
    if not any(name in known for name in state):
        return {}
    model = load_base_model(saved.base, device="cpu")
    require_same_base(model, saved.passport)
    return {name: value.detach() for name, value in base_parameters(model).items() if name in state}


def _classifier_values(
    saved: Saved, base: str, task: ClassifyTask, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base's tensors under the classifier's names; its head is new and has none."""
    model = load_base_model(base, device="cpu", head=task.head)
    require_same_base(model, saved.passport)
    heads = tuple(f"{name}." for name in head_modules(model))
    return {
        name: value.detach()
        for name, value in base_parameters(model).items()
        if name in state and not name.startswith(heads)
    }


def _learned(name: str, value: Tensor, base: Tensor | None) -> Learned:
    wide = torch.promote_types(value.dtype, torch.float32)
    change = value.detach().to(wide) if base is None else value.detach().to(wide) - base.to(wide)
    return Learned(
        site=name,
        shape=list(value.shape),
        norm=float(change.norm()),
        base_norm=None if base is None else float(base.to(wide).norm()),
        is_change=base is not None,
    )


def record(saved: Saved, learned: list[Learned], note: str | None) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "adapter": str(saved.path),
        "bytes": _num_bytes(saved.path),
        "method": saved.name,
        "options": dict(saved.options),
        "num_params": sum(torch.Size(item.shape).numel() for item in learned),
        "sites": [asdict(item) for item in learned],
        "note": note,
        "passport": dict(saved.passport),
    }


def show(found: Mapping[str, Any], learned: list[Learned], facts: Mapping[str, str]) -> None:
    """Print it; `facts` is the passport in a few lines."""
    size, count = format_bytes(found["bytes"]), format_count(found["num_params"])
    console.print_facts(
        found["adapter"],
        {"size": f"{size}, {count} parameters", "method": found["method"], **found["options"]},
    )
    console.print_facts("passport", dict(facts))
    columns = ["tensor", "shape", "norm of the change", "base's norm"]
    table = console.table("what was learned", columns, numbers=columns[1:])
    for item in learned:
        base = "new" if item.base_norm is None else format_number(item.base_norm)
        shape = " x ".join(map(str, item.shape))
        table.add_row(item.site, shape, format_number(item.norm), base)
    console.stdout().print(table)
    if found["note"]:
        console.warn(found["note"])
    silent = [item.site for item in learned if item.norm == 0]
    if silent:
        console.warn(f"{len(silent)} of {len(learned)} tensors did not change: {silent[0]}, ...")


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
