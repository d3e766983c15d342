"""A bias that is learned in float32 in a layer that computes in fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Float32Bias:
    """Keeps one module's bias in float32, and runs the module with a copy in its own dtype.

    The parameter stays where it is, under its name; only during the module's forward pass does the
    copy stand in its place, through which the gradient flows. A step smaller than the copy can
    show is therefore not lost.

    Args:
        module: its bias becomes float32; mutated.
        dtype: what the module computes in.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype
        bias = module.get_parameter("bias")
        self._dtype_before = bias.dtype
        bias.data = bias.data.float()
        self._waiting: nn.Parameter | None = None
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def end(self) -> None:
        """Round the bias to the dtype it had, and let the module run as it did; mutates it."""
        for handle in self._handles:
            handle.remove()
        bias = self._module.get_parameter("bias")
        bias.data = bias.data.to(self._dtype_before)

    def _enter(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        # None where the method that learns it is switched off.
        self._waiting = module._parameters["bias"]
        if self._waiting is not None:
            copy: Any = self._waiting.to(self._dtype)
            module._parameters["bias"] = copy

    def _leave(self, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        module._parameters["bias"] = self._waiting
        self._waiting = None
