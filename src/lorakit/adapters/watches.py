"""Look at layers while a model runs: their inputs, and the gradients of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.math.inits import InputSketch


class Watch(Protocol):
    """What looks at one layer."""

    def see(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Look at a base layer's input and output; what is returned replaces the output."""
        ...


class InputWatch:
    """Collects the leading directions of one layer's inputs (EVA).

    Attributes:
        sketch: the directions.
        mask: (batch, positions), tokens of the present batch that count; None for all.
        total: the sum of all inputs' squares.
    """

    def __init__(self, num: int) -> None:
        self.sketch = InputSketch(num)
        self.mask: Tensor | None = None
        self.total = 0.0

    def see(self, x: Tensor, y: Tensor) -> None:
        """Take in the inputs of one batch."""
        tokens = x.flatten(0, -2)
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            tokens = tokens[self.mask.flatten().bool()]
        self.total += float(tokens.detach().float().square().sum())
        self.sketch.add(tokens)


class GradientWatch:
    """Adds up the gradient of one weight, (out, in) float32, in `total`."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def see(self, x: Tensor, y: Tensor) -> Tensor:
        """Have the gradient of this batch added when it is computed."""
        # The base is frozen: without this, no gradient would be computed for anything.
        y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        inputs = x.detach().flatten(0, -2)

        def add(grad: Tensor) -> None:
            mine = grad.flatten(0, -2).float().T @ inputs.float()
            self.total = mine if self.total is None else self.total.add_(mine)

        y.register_hook(add)
        return y


@contextmanager
def watching(model: nn.Module, watches: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """The model in eval mode with some layers watched; modes and hooks as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for layer, watch in watches.items():

            def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor, watch: Watch = watch) -> Any:
                return watch.see(args[0], y)

            stack.callback(layer.register_forward_hook(hook).remove)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
