"""What a quantized model's configuration says of it, kept true while layers become dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def leave_dense(model: nn.Module, names: Sequence[str]) -> tuple[str, ...] | None:
    """Note in the configuration that these layers are stored dense; mutates `model.config`.

    transformers reads the list when it loads what `save_pretrained` wrote.

    Args:
        model: with layers that were 4-bit and are dense now.
        names: these layers.

    Returns:
        The list as it was, for `restore_skips`; None where there is nothing to restore.
    """
    quantization = _quantization_of(model)
    if not names or quantization is None:
        return None
    before = tuple(quantization.llm_int8_skip_modules or ())
    quantization.llm_int8_skip_modules = [*before, *names]
    return before


def restore_skips(model: nn.Module, before: tuple[str, ...] | None) -> None:
    """Put the list back that `leave_dense` returned; mutates `model.config`."""
    quantization = _quantization_of(model)
    if before is not None and quantization is not None:
        quantization.llm_int8_skip_modules = list(before) or None


def _quantization_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return getattr(config, "quantization_config", None)
