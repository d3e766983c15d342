"""Read the headers of a model's safetensors: which files, how many bytes, without loading any."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorakit.errors import ModelError
from lorakit.files import read_json
from lorakit.models.parts import require_whole

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The names safetensors uses in its headers, with the bytes of one element.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}

# Weights in other layouts, and what belongs to the base alone.
_LEFT_BEHIND = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".md"}
)


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that make up the model in a directory, in order.

    Raises:
        ModelError: there are none, the index cannot be read, or a file it names is missing or
            outside the directory.
    """
    directory = Path(directory)
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if not (directory / _INDEX).is_file():
        require_whole(directory)
        pickles = sorted(entry.name for entry in directory.glob("*.bin"))
        raise ModelError(
            "the model directory has no safetensors",
            where=str(directory),
            expected=f"{_SINGLE}, or {_INDEX} and the files it names",
            found=", ".join(pickles) if pickles else None,
            remedy="save the model with save_pretrained(..., safe_serialization=True)",
        )
    files = [directory / name for name in _indexed_files(directory / _INDEX)]
    missing = [file.name for file in files if not _is_file(file)]
    if missing:
        raise ModelError(
            "weight files named by the index are missing",
            where=str(directory),
            expected=f"{len(files)} files",
            found=f"{len(missing)} missing: {', '.join(missing[:5])}",
            remedy="download or copy the model again",
        )
    return files


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:
        # A name that no file system takes.
        return False


def estimate_model_bytes(directory: str | Path, dtype: torch.dtype | None = None) -> int:
    """The bytes the weights take once loaded, from the headers alone.

    Args:
        directory: a model directory.
        dtype: the dtype that floating tensors are loaded in; None keeps the stored one.

    Raises:
        ModelError: the files are missing or their headers cannot be read.
    """
    total_bytes = 0
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
                    view = tensors.get_slice(name)
                    total_bytes += _tensor_bytes(view.get_shape(), view.get_dtype(), dtype)
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
    return total_bytes


def stored_dtypes(directory: str | Path) -> set[torch.dtype]:
    """The floating dtypes that the checkpoint's tensors have, from the headers alone.

    Raises:
        ModelError: the files are missing or their headers cannot be read.
    """
    found: set[torch.dtype] = set()
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    dtype = _FLOATS.get(tensors.get_slice(name).get_dtype())
                    if dtype is not None:
                        found.add(dtype)
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
    return found


def unreadable(file: Path, error: Exception) -> ModelError:
    """The error for a safetensors file that cannot be read."""
    return ModelError(
        "the model's weights cannot be read",
        where=str(file),
        expected="a whole safetensors file",
        found=str(error),
        remedy="download or copy the file again",
    )


def _tensor_bytes(shape: list[int], stored: str, dtype: torch.dtype | None) -> int:
    if stored in _FLOATS:
        return math.prod(shape) * (dtype or _FLOATS[stored]).itemsize
    return math.prod(shape) * _OTHER_BYTES.get(stored, 1)


def indexed_tensors(directory: Path) -> frozenset[str] | None:
    """The names of the tensors that the index of a sharded model lists; None without an index.

    Raises:
        ModelError: the index cannot be read.
    """
    index = directory / _INDEX
    return frozenset(map(str, _weight_map(index))) if index.is_file() else None


def _indexed_files(index: Path) -> list[str]:
    weight_map = _weight_map(index)
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(
            "the index of the weights names a file outside the model's directory",
            where=str(index),
            found=outside[0],
            remedy="do not use this model: its index has been tampered with",
        )
    return names


def _weight_map(index: Path) -> dict[Any, Any]:
    expected = 'a JSON object with "weight_map"'
    try:
        content = read_json(index)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the index of the weights is not JSON",
            where=str(index),
            expected=expected,
            found=str(error),
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index of the weights has no map", where=str(index), expected=expected)
    return weight_map


def copy_companions(directory: Path, output: Path) -> None:
    """Copy tokenizer, generation settings and code: everything but weights and the base's card."""
    for file in directory.iterdir():
        name = file.name
        if not file.is_file() or file.suffix in _LEFT_BEHIND or name.startswith("."):
            continue
        if name.endswith(".index.json") or name in ("config.json", "merge.json"):
            continue
        shutil.copyfile(file, output / name)
