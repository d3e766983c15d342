"""Bottleneck adapters: two small matrices with a nonlinearity between, added to what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers.adapted import Wrapper
from lorakit.layers.routing import Routing

Activation = Literal["relu", "gelu", "silu"]
Where = Literal["module", "block", "norm"]

_NORM_EPS = 1e-5
_FUNCTIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Bottleneck(nn.Module):
    """A(x) = W_up f(W_down LN(x) + b_down) + b_up, without LN where there is none.

    W_up and the biases start at zero, so A(x) = 0 at the start and x + A(x) is the identity; W_down
    starts uniform in (-1/sqrt(d), 1/sqrt(d)), so the first step already moves W_up.

    Args:
        width: d, the size of x.
        size: r, the size of the bottleneck.
        activation: f.
        with_norm: whether a layer norm of its own stands in front.
        device: where the parameters live.
        dtype: what they are stored in, float32 as a rule.
    """

    def __init__(
        self,
        width: int,
        size: int,
        *,
        activation: Activation,
        with_norm: bool,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.norm = (
            nn.LayerNorm(width, eps=_NORM_EPS, device=device, dtype=dtype) if with_norm else None
        )
        # Its own initialisation of the weight is the uniform one that is wanted.
        self.down = nn.Linear(width, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, width, device=device, dtype=dtype)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """A(x), in the shape and dtype of x, which is (..., d).

        The parameters stay as they are stored; copies of them, not of the activations, are cast.
        """
        dtype = x.dtype
        h = x
        if self.norm is not None:
            h = F.layer_norm(
                h, (h.shape[-1],), self.norm.weight.to(dtype), self.norm.bias.to(dtype), _NORM_EPS
            )
        h = F.linear(h, self.down.weight.to(dtype), self.down.bias.to(dtype))
        h = _FUNCTIONS[self.activation](h)
        return F.linear(h, self.up.weight.to(dtype), self.up.bias.to(dtype)).to(dtype)

    def extra_repr(self) -> str:
        """The nonlinearity, for print(model)."""
        return self.activation


def num_bottleneck_params(width: int, size: int, *, with_norm: bool) -> int:
    """2 d r + r + d, and 2 d more with a layer norm (Hu et al. 2021, section 5.1)."""
    return 2 * width * size + size + width + (2 * width if with_norm else 0)


@dataclass
class Switch:
    """Which adapters of one model run.

    Attributes:
        on: whether any does.
        num_dropped: blocks, counted from the input, whose adapters do not run in eval mode.
        num_dropped_training: the same in training mode.
    """

    on: bool = True
    num_dropped: int = 0
    num_dropped_training: int = 0


class BottleneckSite(Wrapper):
    """A base module with an adapter at its output; forward changes nothing.

    Args:
        base: the frozen module.
        adapter: what is added.
        switch: whether it runs, shared by the whole model.
        block: the number of the transformer block it belongs to.
        where: "module": y + A(y) at the module's output. "block": the same at the output of a
            whole block. "norm": the module is the norm behind a residual s, and
            y = LN(s + A(LN(s))), as Pfeiffer et al. 2021 have it.
        name: the module's name in the model.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: Bottleneck,
        *,
        switch: Switch,
        block: int,
        where: Where,
        name: str,
    ) -> None:
        super().__init__(base, routing=Routing(), name=name)
        self.adapter = adapter.train(base.training)
        self.switch = switch
        self.block = block
        self.where = where
        if where == "block":
            # A hook and not this forward: transformers records hidden states by hooks on the block
            # itself, and they must see the adapter's output. Prepended, it runs before theirs.
            base.register_forward_hook(self._after_block, prepend=True)

    @property
    def runs(self) -> bool:
        """Whether the adapter is switched on."""
        switch = self.switch
        first = switch.num_dropped_training if self.training else switch.num_dropped
        return switch.on and self.block >= first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base takes and returns."""
        if self.where == "block" or not self.runs:
            return self.base(*args, **kwargs)
        if self.where == "norm":
            (s,) = args
            return self.base(s + self.adapter(self.base(s)))
        y = self.base(*args, **kwargs)
        return y + self.adapter(y)

    def _after_block(self, _base: nn.Module, _args: Any, output: Any) -> Any:
        if not self.runs:
            return None
        if isinstance(output, tuple):
            return (output[0] + self.adapter(output[0]), *output[1:])
        return output + self.adapter(output)


class DropAtRandom:
    """Before every training step's forward pass: drop the adapters of the first n blocks.

    n is uniform in 0..largest (Ruecklé et al. 2021, "robust" AdapterDrop). It is drawn from torch's
    global generator on the CPU, which a resumed run restores, and once per pass of the whole model,
    so that gradient checkpointing recomputes what ran.

    Args:
        switch: of the model.
        largest: the most blocks that are dropped.
    """

    def __init__(self, switch: Switch, largest: int) -> None:
        self.switch = switch
        self.largest = largest

    def __call__(self, model: nn.Module, _args: Any) -> None:
        """A forward pre-hook of the whole model; in eval mode it does nothing."""
        if model.training:
            drawn = torch.randint(self.largest + 1, (), device="cpu")
            self.switch.num_dropped_training = int(drawn)
