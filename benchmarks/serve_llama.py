"""A GGUF file in float32, for comparisons with llama.cpp in the same arithmetic."""

from __future__ import annotations

import importlib
from pathlib import Path


def in_float32(source: Path, target: Path) -> Path:
    """A GGUF file with its tensors multiplied out: llama.cpp then rounds no activations.

    Args:
        source: any GGUF file that the package gguf can multiply out.
        target: written.
    """
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
