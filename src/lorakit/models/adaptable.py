"""Checkpoints that no adapter can be trained on, told apart before anything is read of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorakit.errors import ModelError
from lorakit.models.checkpoint import unreadable, weight_files

_PACKED = "its weights are packed integers for one kernel, which has no backward pass here"
_FLOATS = "its weights are 8-bit floats with scales beside them, which no layer here multiplies"
# quant_method of transformers -> why an adapter cannot stand on it.
_REASONS = {
    "gptq": _PACKED,
    "awq": _PACKED,
    "auto-round": _PACKED,
    "aqlm": "its weights are sums of code book entries",
    "vptq": "its weights are sums of code book entries",
    "spqr": _PACKED,
    "higgs": _PACKED,
    "hqq": _PACKED,
    "eetq": _PACKED,
    "quanto": _PACKED,
    "torchao": "its weights are tensor subclasses of another library",
    "bitnet": "its weights are ternary numbers, packed four to a byte",
    "compressed-tensors": "its weights are packed or scaled by another library",
    "fp8": _FLOATS,
    "fbgemm_fp8": _FLOATS,
    "mxfp4": "its weights are 4-bit floats in blocks with scales beside them",
    "modelopt": "its weights are packed or scaled for TensorRT",
}
# Names of tensors that only packed or scaled weights have.
_PACKED_NAMES = re.compile(r"\.(qweight|weight_packed|weight_scale(_inv)?|SCB|weight_blocks)$")
_DENSE = "take the dense checkpoint of the same model; quantize='nf4' makes 4 bits of it"


def require_adaptable_config(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a quantization that cannot be adapted, as config.json names it.

    Args:
        config: config.json.
        directory: where it lies.

    Raises:
        ModelError: with the reason.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return
    if not (stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit")):
        raise cannot_adapt(stored, directory)


def cannot_adapt(quantization: Mapping[str, Any], directory: Path) -> ModelError:
    """The error for a quantization that cannot be adapted, with the reason."""
    method = str(quantization.get("quant_method", "") or "unnamed")
    eight = method == "bitsandbytes"
    why = "its weights are 8-bit integers whose rows have scales" if eight else _REASONS.get(method)
    return ModelError(
        "the checkpoint is quantized in a way that cannot be adapted" + (f": {why}" if why else ""),
        where=f"{directory / 'config.json'}, key quantization_config",
        expected="no quantization, or bitsandbytes' 4 bits",
        found=method + (", 8 bits" if eight else ""),
        remedy=_DENSE,
    )


def require_dense(directory: Path) -> None:
    """Refuse tensors that would be read as numbers and are not: packed integers, scaled floats.

    Headers alone are read. Without it a checkpoint whose config.json forgot its quantization would
    load as a model that computes nonsense.

    Raises:
        ModelError: there are such tensors.
    """
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                kinds = {name: str(tensors.get_slice(name).get_dtype()) for name in names}
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
        packed = _packed(kinds.items())
        if packed:
            name, kind = packed[0]
            raise ModelError(
                f"the checkpoint is quantized, and its config.json does not say how: {len(packed)} "
                "tensors are not the weights themselves",
                where=f"{file}: {name}",
                expected="floating numbers of 16 bits or more",
                found=kind,
                remedy=_DENSE,
            )


def _packed(kinds: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (name, kind)
        for name, kind in kinds
        if _PACKED_NAMES.search(name)
        or kind.startswith("F8")
        or (name.endswith(".weight") and kind in ("I8", "U8", "I32", "F4"))
    ]
