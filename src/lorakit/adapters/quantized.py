"""What a quantized model's configuration says of it, kept true while layers become dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

# What a configuration named before: its list, or that it had none.
Skips = tuple[list[str] | None]


def leave_dense(model: nn.Module, names: Sequence[str]) -> Skips | None:
    """Note in the configuration that these layers are stored dense; mutates `model.config`.

    transformers reads the list when it loads what `save_pretrained` wrote.

    Args:
        model: with layers that were 4-bit and are dense now.
        names: these layers.

    Returns:
        The list as it was (or None), in a tuple for `restore_skips`; None where nothing is noted.
    """
    quantization = _quantization_of(model)
    if not names or quantization is None:
        return None
    before: list[str] | None = quantization.llm_int8_skip_modules
    quantization.llm_int8_skip_modules = [*(before or ()), *names]
    return (before,)


def restore_skips(model: nn.Module, before: Skips | None) -> None:
    """Put the list back that `leave_dense` returned; mutates `model.config`."""
    quantization = _quantization_of(model)
    if before is not None and quantization is not None:
        quantization.llm_int8_skip_modules = before[0]


def _quantization_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return getattr(config, "quantization_config", None)
