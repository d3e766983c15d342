"""Walk a GGUF header before it is believed: its counts are checked against the file's bytes.

The reader of llama.cpp's package makes as many values as a count claims, past the file's end too: a
file of a hundred bytes could keep it busy for hours and fill the memory.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type -> bytes.
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS, _MOST_NESTING = 8, 4
# The densest quantization has 256 numbers in 34 bytes; a header that claims more is wrong.
_MOST_NUMBERS_PER_BYTE = 16


def check_gguf_header(file: Path) -> None:
    """Refuse a header that does not fit its file; nothing but the header is read.

    Little-endian files alone: others are written by nothing in use.

    Raises:
        ValueError: what is wrong.
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        if stream.seek(0, 2) < 24:
            raise ValueError("shorter than a GGUF header")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).file()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.num_numbers = 0

    def file(self) -> None:
        magic = bytes(self.data[:4])
        self.at = 4
        version = self.number("<I", 4)
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError("not a GGUF file of version 2 or 3, little-endian")
        num_tensors = self.number("<Q", 8)
        num_facts = self.number("<Q", 8)
        for _ in range(num_facts):
            self.string()
            self.value(self.number("<I", 4), nested=0)
        for _ in range(num_tensors):
            self.tensor()

    def tensor(self) -> None:
        self.string()
        num_dimensions = self.number("<I", 4)
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions} dimensions")
        size = math.prod(self.number("<Q", 8) for _ in range(num_dimensions))
        self.number("<I", 4)
        offset = self.number("<Q", 8)
        # All of them together: a thousand tensors may lie over the same bytes.
        self.num_numbers += size
        too_many = self.num_numbers > _MOST_NUMBERS_PER_BYTE * len(self.data)
        if too_many or offset > len(self.data):
            raise ValueError("tensors that are larger than the file")

    def value(self, kind: int, *, nested: int) -> None:
        if kind in _FIXED:
            self.skip(_FIXED[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY and nested < _MOST_NESTING:
            inner, count = self.number("<I", 4), self.number("<Q", 8)
            if inner in _FIXED:
                self.skip(count * _FIXED[inner])
                return
            for _ in range(count):
                self.value(inner, nested=nested + 1)
        else:
            raise ValueError(f"a value of unknown type {kind}")

    def string(self) -> None:
        self.skip(self.number("<Q", 8))

    def number(self, code: str, size: int) -> int:
        start = self.at
        self.skip(size)
        return struct.unpack(code, self.data[start : self.at])[0]

    def skip(self, num_bytes: int) -> None:
        # Every count is paid for in bytes, so a walk ends where the file does.
        if num_bytes > len(self.data) - self.at:
            raise ValueError("the header goes on behind the end of the file")
        self.at += num_bytes
