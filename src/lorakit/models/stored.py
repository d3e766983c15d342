"""The tensors of a checkpoint by the names they have in the model, one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import ModelError
from lorakit.models.checkpoint import unreadable, weight_files


class StoredParameters:
    """Reads a model's parameters from its safetensors, mapped into memory, never all at once.

    Args:
        directory: a model directory.
        model: the same model without weights: it says which parameters there are, and which share
            their values.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        self._files = {file.name: file for file in weight_files(directory)}
        self._location = self._headers()
        self._stored = self._names(model)

    @property
    def missing(self) -> list[str]:
        """Parameters that no tensor of the checkpoint is named for."""
        return [name for name, stored in self._stored.items() if stored is None]

    def read(self, parameter: str) -> Tensor:
        """The values of one parameter, as they are stored.

        Raises:
            ModelError: the file cannot be read, or the tensor is not of floating-point numbers.
            KeyError: the checkpoint has no tensor of this name; see `missing`.
        """
        stored = self._stored[parameter]
        if stored is None:
            raise KeyError(parameter)
        file = self._files[self._location[stored]]
        try:
            with safe_open(str(file), framework="pt") as tensors:
                value = tensors.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
        if not value.is_floating_point():
            raise ModelError(
                "the checkpoint is quantized: there is no dense weight to read",
                where=f"{file.name}: {stored}",
                found=str(value.dtype),
                remedy="give the dense checkpoint of the same model",
            )
        return value

    def _headers(self) -> Mapping[str, str]:
        location: dict[str, str] = {}
        for name, file in self._files.items():
            try:
                with safe_open(str(file), framework="pt") as tensors:
                    location.update(dict.fromkeys(tensors.keys(), name))
            except (SafetensorError, OSError) as error:
                raise unreadable(file, error) from error
        return location

    def _names(self, model: PreTrainedModel) -> dict[str, str | None]:
        prefix = str(model.base_model_prefix)
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        found: dict[str, str | None] = {}
        for names in groups.values():
            candidates = [
                c for n in names for c in (n, n.removeprefix(f"{prefix}."), f"{prefix}.{n}")
            ]
            found[names[0]] = next((c for c in candidates if c in self._location), None)
        return found
