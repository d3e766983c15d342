"""Files of tensors that other tools wrote: read whole, or asked for a name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.errors import AdapterFileError

# What safetensors raises for damaged files, and torch for dtypes that it does not have.
UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, floating-point ones in float32.

    Raises:
        AdapterFileError: no such file, or a corrupt one.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {key: widened(handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise AdapterFileError(
            "the adapter's tensors cannot be read",
            where=str(file),
            found=first_line(error),
            remedy="copy the file again",
        ) from error


def has_key(file: Path, ending: str) -> bool:
    """Whether a safetensors file can be read and has a tensor whose name ends so."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return any(key.endswith(ending) for key in tensors.keys())  # noqa: SIM118
    except UNREADABLE:
        return False


def first_line(error: Exception) -> str:
    """What an error says, shortly; some say nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def widened(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32, which holds all of them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
