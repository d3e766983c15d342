"""GGUF adapters for llama.cpp: one file, `<tensor>.weight.lora_a` (r, in) and `.lora_b` (out, r).

Names are llama.cpp's (`blk.0.attn_q`), from the gguf package's own table. The scaling is
`adapter.lora.alpha` over the tensor's rank, one alpha for the file. Llama's query and key rows
stand in llama.cpp's order (the two halves of every head interleaved), so lora_b is permuted as its
converter does; `token_embd`'s lora_a is transposed, because the look-up reads its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.errors import AdapterFileError, RequestError
from lorakit.formats.foreign import (
    Conversion,
    Names,
    common_alpha,
    made_adapter,
    pairs_of,
    whole_updates,
)
from lorakit.formats.gguf_header import check_gguf_header

_FILE = "adapter.gguf"
_ENDINGS = (".weight.lora_a", ".weight.lora_b")


@dataclass(frozen=True, slots=True)
class _Arch:
    arch: gguf.MODEL_ARCH
    permuted: bool = False  # whether rows of q and k are reordered


# Architectures whose tensors llama.cpp's converter renames and at most permutes.
_ARCHS = {
    "llama": _Arch(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mistral": _Arch(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": _Arch(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Arch(gguf.MODEL_ARCH.QWEN3),
    "gemma2": _Arch(gguf.MODEL_ARCH.GEMMA2),
    "gemma3_text": _Arch(gguf.MODEL_ARCH.GEMMA3),
    "phi3": _Arch(gguf.MODEL_ARCH.PHI3),
}


class GgufFormat:
    """One .gguf file of the type adapter."""

    name = "gguf"
    about = "llama.cpp's GGUF adapter"

    def recognises(self, path: Path) -> bool:
        """A .gguf file, or a directory with adapter.gguf."""
        return (path.suffix == ".gguf" and path.is_file()) or (path / _FILE).is_file()

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter; quantized factors are dequantized.

        Raises:
            AdapterFileError: not an adapter, another architecture, or unknown tensors.
            RequestError: an architecture whose layout is not known here.
        """
        file = path / _FILE if path.is_dir() else path
        names = _GgufNames(given)
        alpha, tensors = _read(file, names.arch)
        pairs = pairs_of(tensors, _ENDINGS, file)
        unknown = [key for key in tensors if not key.endswith(_ENDINGS)]
        if unknown:
            raise AdapterFileError(
                "the file has tensors that are no low-rank update",
                where=str(file),
                found=", ".join(unknown[:6]),
            )
        factors: dict[str, Factors] = {}
        for key, (a, b) in pairs.items():
            module = names.modules_by_gguf.get(key)
            if module is None:
                raise AdapterFileError(
                    "the file adapts a tensor that the base does not have",
                    where=f"{file}: {key}",
                    remedy="is --base right?",
                )
            A = a.T if key == "token_embd" else a
            if b.shape[0] % names.row_step(module):
                raise AdapterFileError(
                    "a factor whose rows are no whole heads",
                    where=f"{file}: {key}",
                    expected=f"a multiple of {names.row_step(module)} rows",
                    found=str(b.shape[0]),
                    remedy="is --base right?",
                )
            B = names.own_rows(module, b)
            # llama.cpp takes alpha = 0 for a scaling of 1.
            scaling = alpha / b.shape[1] if alpha else 1.0
            factors[module] = names.names.factors(module, A, B, scaling=scaling, where=file)
        return made_adapter(factors, given, source=file, format_name=self.name)

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write adapter.gguf in float32.

        Raises:
            RequestError: DoRA, parameters beside, or an architecture whose layout is not known.
        """
        names = _GgufNames(given)
        updates = whole_updates(adapter, "a GGUF adapter", ("linear", "embedding"))
        alpha = common_alpha([u.scaling for u in updates], [u.A.shape[0] for u in updates])
        writer = gguf.GGUFWriter(str(path / _FILE), gguf.MODEL_ARCH_NAMES[names.arch.arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for update in updates:
            key = names.gguf_name(update.module)
            B = names.llama_rows(update.module, update.at(alpha / update.A.shape[0]))
            A = update.A.T if key == "token_embd" else update.A
            for ending, tensor in zip(_ENDINGS, (A, B), strict=True):
                writer.add_tensor(key + ending, tensor.contiguous().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path / _FILE


class _GgufNames:
    """Names and row orders of one base in llama.cpp.

    Args:
        given: the base.

    Raises:
        RequestError: its layout in llama.cpp is not known here.
    """

    def __init__(self, given: Conversion) -> None:
        config: Any = getattr(given.model, "config", None)
        text: Any = config.get_text_config() if config is not None else None
        arch = _ARCHS.get(str(getattr(text, "model_type", "")))
        if arch is None:
            raise RequestError(
                "how llama.cpp lays out this architecture is not known here",
                where="--base",
                expected=", ".join(_ARCHS),
                found=str(getattr(text, "model_type", type(given.model).__name__)),
                remedy="merge the adapter and convert the merged model with llama.cpp",
            )
        self.arch = arch
        self.names = Names(given.model)
        self._heads = int(text.num_attention_heads)
        self._kv_heads = int(getattr(text, "num_key_value_heads", None) or self._heads)
        self._tied = bool(text.tie_word_embeddings)
        table = gguf.get_tensor_name_map(arch.arch, int(text.num_hidden_layers))
        self._to_gguf = {m: table.get_name(m) for m in self.names.modules}
        self.modules_by_gguf = {g: m for m, g in self._to_gguf.items() if g is not None}

    def gguf_name(self, module: str) -> str:
        """llama.cpp's name of a module.

        Raises:
            RequestError: it has none, or it is one of a tied pair: llama.cpp keeps one tensor for
                embedding and head, and stops where an adapter changes it.
        """
        name = self._to_gguf.get(module)
        if name is None or (name in ("output", "token_embd") and self._tied):
            raise RequestError(
                "llama.cpp has no tensor of its own for this module"
                + (": embedding and head are tied" if name else ""),
                where=module,
                remedy="merge the adapter and convert the merged model with llama.cpp",
            )
        return name

    def llama_rows(self, module: str, B: Tensor) -> Tensor:
        """lora_b in llama.cpp's row order."""
        heads = self._permuted_heads(module)
        if not heads:
            return B
        return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def own_rows(self, module: str, B: Tensor) -> Tensor:
        """The inverse of `llama_rows`."""
        heads = self._permuted_heads(module)
        if not heads:
            return B
        return B.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def row_step(self, module: str) -> int:
        """What the number of rows of lora_b must be a multiple of."""
        return 2 * self._permuted_heads(module) or 1

    def _permuted_heads(self, module: str) -> int:
        leaf = module.rpartition(".")[2]
        if not self.arch.permuted:
            return 0
        return {"q_proj": self._heads, "k_proj": self._kv_heads}.get(leaf, 0)


# What the reader and its dequantization raise for damaged files.
_BROKEN = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    NotImplementedError,
)


def _read(file: Path, arch: _Arch) -> tuple[float, dict[str, Tensor]]:
    try:
        check_gguf_header(file)
        reader = gguf.GGUFReader(str(file))
        facts = {key: _value(reader, key) for key in reader.fields}
        tensors = {
            t.name: torch.from_numpy(
                np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)
            )
            for t in reader.tensors
        }
    except _BROKEN as error:
        raise AdapterFileError(
            "the GGUF file cannot be read",
            where=str(file),
            found=str(error) or "not a GGUF file",
            remedy="copy the file again",
        ) from error
    expected = gguf.MODEL_ARCH_NAMES[arch.arch]
    kind = (facts.get(gguf.Keys.General.TYPE), facts.get(gguf.Keys.Adapter.TYPE))
    if kind != ("adapter", "lora") or gguf.Keys.Adapter.LORA_ALPHA not in facts:
        raise AdapterFileError(
            "the GGUF file is not a LoRA adapter",
            where=str(file),
            expected="general.type adapter, adapter.type lora, adapter.lora.alpha",
            found=f"{kind[0]}, {kind[1]}",
        )
    if gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS in facts:
        raise AdapterFileError(
            "an activated LoRA works only behind its invocation tokens, and would give other "
            "results as an ordinary one",
            where=str(file),
            found=f"{gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS} "
            f"{facts[gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS]}",
        )
    found = facts.get(gguf.Keys.General.ARCHITECTURE)
    if found != expected:
        raise AdapterFileError(
            "the adapter is for another architecture",
            where=str(file),
            expected=expected,
            found=str(found),
            remedy="is --base right?",
        )
    alpha = facts[gguf.Keys.Adapter.LORA_ALPHA]
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterFileError(
            "the adapter's alpha is no finite number", where=str(file), found=repr(alpha)
        )
    return float(alpha), tensors


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
