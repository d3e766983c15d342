"""What a quantized model's configuration says of it, kept true while layers become dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def leave_dense(model: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Note in the configuration that these layers are stored dense; mutates `model.config`.

    transformers reads the list when it loads what `save_pretrained` wrote.

    Args:
        model: with layers that were 4-bit and are dense now.
        names: these layers.

    Returns:
        What puts the list back as it was.
    """
    config: Any = getattr(model, "config", None)
    quantization: Any = getattr(config, "quantization_config", None)
    if not names or quantization is None:
        return lambda: None
    before = quantization.llm_int8_skip_modules
    quantization.llm_int8_skip_modules = [*(before or ()), *names]

    def restore() -> None:
        quantization.llm_int8_skip_modules = before

    return restore
