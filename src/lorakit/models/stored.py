"""The tensors of a checkpoint by the names they have in the model, one in memory at a time."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import (
    HfHubHTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import ModelError
from lorakit.models.checkpoint import indexed_tensors, unreadable, weight_files
from lorakit.models.load import Ref
from lorakit.models.resolve import ResolvedModel, resolve_model


def missing_parameters(ref: Ref, model: PreTrainedModel) -> list[str]:
    """Parameters that no tensor of a base's files is named for; no weights are downloaded.

    Args:
        ref: the base, see `lorakit.models.load.load_model`.
        model: the same model without weights.

    Raises:
        ModelError: the base cannot be found, or its headers cannot be read.
    """
    return _without(_stored_names(model, tensor_names(ref)))


def tensor_names(ref: Ref) -> frozenset[str]:
    """The names of a base's tensors: from headers, and for a hub id from its index or header.

    Raises:
        ModelError: the base cannot be found, or its headers cannot be read.
    """
    resolved = resolve_model(ref, files="small")
    if resolved.origin == "hub":
        names = _names_on_hub(resolved)
        if names is not None:
            return names
        resolved = resolve_model(ref)
    return frozenset(name for file in weight_files(resolved.path) for name in _keys(file))


def _names_on_hub(resolved: ResolvedModel) -> frozenset[str] | None:
    """From what is in the cache, or a request for the header alone; None where neither tells."""
    indexed = indexed_tensors(resolved.path)
    if indexed is not None:
        return indexed
    try:
        return frozenset(name for file in weight_files(resolved.path) for name in _keys(file))
    except ModelError:
        pass
    try:
        found = get_safetensors_metadata(resolved.ref)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError):
        return None
    return frozenset(name for file in found.files_metadata.values() for name in file.tensors)


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def _stored_names(model: PreTrainedModel, stored: Container[str]) -> dict[str, str | None]:
    """Parameter -> the tensor that holds it; the first of tied ones stands for all."""
    prefix = str(model.base_model_prefix)
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found: dict[str, str | None] = {}
    for names in groups.values():
        candidates = [c for n in names for c in (n, n.removeprefix(f"{prefix}."), f"{prefix}.{n}")]
        found[names[0]] = next((c for c in candidates if c in stored), None)
    return found


def _without(stored: Mapping[str, str | None]) -> list[str]:
    return [name for name, tensor in stored.items() if tensor is None]


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
        self._stored = _stored_names(model, self._location)

    @property
    def missing(self) -> list[str]:
        """Parameters that no tensor of the checkpoint is named for."""
        return _without(self._stored)

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
            location.update(dict.fromkeys(_keys(file), name))
        return location
