"""What was saved, read again and compared with the model before its success is reported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.extract import adapter_from_model
from lorakit.errors import TrainingError
from lorakit.formats.peft import changed_since_saved
from lorakit.methods.base import Method
from lorakit.methods.files import read_state
from lorakit.methods.full import FullMethod, read_full_state
from lorakit.methods.lora import LoraMethod
from lorakit.models.stored import StoredParameters


def check_saved(method: Method, model: nn.Module, path: Path) -> None:
    """Compare a saved directory, as anybody would read it, with what the model has learned.

    Args:
        method: what was saved.
        model: with the method attached; not changed.
        path: the directory.

    Raises:
        AdapterFileError: it cannot be read.
        TrainingError: a tensor is missing, or is not what was learned, bit for bit.
    """
    if isinstance(method, LoraMethod):
        changed = changed_since_saved(adapter_from_model(model, method.adapter_name), path)
    elif isinstance(method, FullMethod) and isinstance(model, PreTrainedModel):
        changed = _changed_whole(method, model, path)
    else:
        found = read_state(path)
        changed = [
            name
            for name, value in method.state(model).items()
            if name not in found or not torch.equal(found[name], value.detach().cpu())
        ]
    if changed:
        raise TrainingError(
            "what was saved is not what was learned",
            where=str(path),
            expected="the tensors of the model, bit for bit",
            found=", ".join(changed[:8]),
            remedy="look at the disk; the checkpoints hold what was learned",
        )


def _changed_whole(method: FullMethod, model: PreTrainedModel, path: Path) -> list[str]:
    """Parameters of a whole model that are not in its directory, one of them read at a time."""
    stored = StoredParameters(path, model)
    # Where transformers renames on load, only a second model knows which tensor is which.
    whole = read_full_state(model, path) if stored.missing else {}
    changed: list[str] = []
    for name, value in method.state(model).items():
        found = whole.get(name) if stored.missing else stored.read(name)
        if found is None or not torch.equal(found, value.detach().cpu()):
            changed.append(name)
    return changed
