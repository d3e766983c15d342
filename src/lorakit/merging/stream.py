"""Write a safetensors file tensor by tensor: never more than one of them in memory.

The format: eight bytes of length, a JSON header (name -> dtype, shape, offsets), the bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorakit.models.checkpoint import unreadable

_BUFFER_BYTES = 1 << 22
_ALIGNMENT = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its name, how it is stored, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def renamed(self, name: str) -> Stored:
        """The same under another name."""
        return Stored(name, self.dtype, self.shape, self.start, self.num_bytes)


class SourceFile:
    """A safetensors file, read by offsets rather than mapped into memory.

    Args:
        path: the file.

    Raises:
        ModelError: its header cannot be read, or does not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer = torch.empty(0, dtype=torch.uint8)
        try:
            self._file = path.open("rb")
            length = int.from_bytes(self._file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {"format": "pt"}
            self.tensors = sorted(
                (_entry(name, facts, 8 + length, size) for name, facts in header.items()),
                key=lambda entry: entry.start,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, error) from error

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, entry: Stored) -> Tensor:
        """One floating tensor, a copy that may be written to; good until the next one is read.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        if self._buffer.numel() < entry.num_bytes:
            # One for all tensors: the system clears fresh memory, which takes longer than reading.
            self._buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
        data = self._buffer[: entry.num_bytes]
        self._file.seek(entry.start)
        if self._file.readinto(data.numpy().data) != entry.num_bytes:
            raise unreadable(self.path, OSError(f"the file ends within {entry.name}"))
        return data.view(_DTYPES[entry.dtype]).view(entry.shape)

    def copy(self, entry: Stored, target: BinaryIO) -> None:
        """One tensor's bytes into another file.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        self._file.seek(entry.start)
        left = entry.num_bytes
        while left:
            chunk = self._file.read(min(left, _BUFFER_BYTES))
            if not chunk:
                raise unreadable(self.path, OSError(f"the file ends within {entry.name}"))
            target.write(chunk)
            left -= len(chunk)


def write_header(target: BinaryIO, entries: list[Stored], metadata: dict[str, str]) -> int:
    """Begin a file that will hold these tensors in this order; returns their bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    target.write(len(text).to_bytes(8, "little"))
    target.write(text)
    return offset


def write_tensor(target: BinaryIO, value: Tensor) -> None:
    """The bytes of a tensor, in its layout."""
    target.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def _entry(name: str, facts: dict[str, Any], base: int, size: int) -> Stored:
    begin, end = facts["data_offsets"]
    if not 0 <= begin <= end <= size - base:
        raise ValueError(f"{name} lies outside of the file")
    return Stored(name, str(facts["dtype"]), tuple(facts["shape"]), base + begin, end - begin)
