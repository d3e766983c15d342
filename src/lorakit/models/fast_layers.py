"""Which decoder layers run as one autograd function in training, and how they are told apart.

A layer is recognised by its class and those of its parts, whose forward passes were read; before
each pass it is looked at again, because adapters, hooks and modes come and go. Everything else
runs its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorakit.layers.adapted import AdaptedLayer, Wrapper
from lorakit.layers.decoder import LayerShape, Product, decoder_layer
from lorakit.layers.fused import frozen_parameters
from lorakit.layers.low_rank import Branch, LowRank
from lorakit.layers.packed import Packing

# Classes of transformers whose layer is norm, attention with rotary positions, norm, gated MLP.
_LAYERS = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Attention(Protocol):
    head_dim: int
    scaling: float
    attention_dropout: float


def use_fast_layers(model: nn.Module) -> int:
    """Let the model's decoder layers run as one function where that is known to be the same.

    Mutates `model`: recognised layers get their forward replaced; it runs the layer's own unless
    the batch is packed. `use_own_layers` takes it away.

    Returns:
        How many layers were recognised.
    """
    count = 0
    for module in model.modules():
        if _is_known(module) and "forward" not in vars(module):
            module.forward = cast(Callable[..., Any], partial(_forward, module, module.forward))
            count += 1
    return count


def use_own_layers(model: nn.Module) -> None:
    """Undo `use_fast_layers`."""
    for module in model.modules():
        mine = vars(module).get("forward")
        if isinstance(mine, partial) and mine.func is _forward:
            del module.forward


def _is_known(module: nn.Module) -> bool:
    cls = type(module)
    family = cls.__module__.split(".")[-2:-1]
    return (
        cls.__module__.startswith("transformers.models.")
        and bool(family)
        and _LAYERS.get(family[0]) == cls.__name__
    )


def _forward(
    layer: nn.Module, own: Callable[..., Any], hidden_states: Tensor, **given: Any
) -> Tensor:
    packing = given.get("packing")
    rotary = given.get("position_embeddings")
    if isinstance(packing, Packing) and rotary is not None:
        found = _shape_of(layer, hidden_states, packing)
        if found is not None:
            shape, factors = found
            run = partial(_run, rotary=rotary, packing=packing, shape=shape)
            if layer.training and vars(layer).get("gradient_checkpointing", False):
                checkpoint = cast(
                    Callable[..., Tensor], vars(layer)["_gradient_checkpointing_func"]
                )
                return checkpoint(run, hidden_states, *factors)
            return run(hidden_states, *factors)
    return own(hidden_states, **given)


def _run(
    x: Tensor,
    *factors: Tensor,
    rotary: tuple[Tensor, Tensor],
    packing: Packing,
    shape: LayerShape,
) -> Tensor:
    return decoder_layer(x, rotary, packing, shape, list(factors))


def _shape_of(
    layer: nn.Module, x: Tensor, packing: Packing
) -> tuple[LayerShape, list[Tensor]] | None:
    """The layer as the function takes it, and its factors; None where it must run its own way."""
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    norms = [layer.get_submodule(name) for name in _NORMS]
    activation = mlp.get_submodule("act_fn")
    if any(_is_its_own(m) for m in (attention, mlp, activation, *norms)):
        return None
    facts = cast(_Attention, attention)
    dropped = attention.training and facts.attention_dropout
    known = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    weights = [norm.get_parameter("weight") for norm in norms]
    if dropped or not known or any(w.requires_grad or w.dtype != x.dtype for w in weights):
        return None
    products: list[Product] = []
    factors: list[Tensor] = []
    for owner, parts in ((attention, _ATTENTION), (mlp, _MLP)):
        for name in parts:
            found = _product_of(owner.get_submodule(name), packing)
            if found is None:
                return None
            products.append(found[0])
            factors += found[1]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    width = facts.head_dim
    eps = [float(vars(norm)["variance_epsilon"]) for norm in norms]
    shape = LayerShape(
        products=tuple(products),
        norms=(weights[0], weights[1]),
        eps=(eps[0], eps[1]),
        heads=products[0].weight.shape[0] // width,
        groups=products[1].weight.shape[0] // width,
        scale=facts.scaling,
        dtype=dtype,
        spans=_spans_of(packing),
    )
    return shape, factors


def _spans_of(packing: Packing) -> tuple[tuple[int, int | None], ...]:
    """The tokens of each adapter; all of them where one runs for the whole batch."""
    return tuple((begin, end) for _, begin, end in packing.spans) or ((0, None),)


def _product_of(module: nn.Module, packing: Packing) -> tuple[Product, list[Tensor]] | None:
    """A frozen linear layer with at most one plain update of each adapter, or None."""
    num_spans = len(_spans_of(packing))
    if not isinstance(module, AdaptedLayer):
        frozen = frozen_parameters(module)
        return None if frozen is None else (Product(*frozen, (None,) * num_spans), [])
    frozen = frozen_parameters(module.base)
    if frozen is None or _is_hooked(module):
        return None
    scalings: list[float | None] = []
    factors: list[Tensor] = []
    for name in _running(module, packing):
        branch = None if name is None else module.branch_of(name)
        update = None if branch is None else _plain_update(branch)
        if branch is not None and update is None:
            return None
        scalings.append(None if update is None else update.scaling)
        factors += [] if update is None else [update.down, update.lora_B]
    return Product(*frozen, tuple(scalings)), factors


def _running(module: AdaptedLayer, packing: Packing) -> list[str | None]:
    """The adapter of each span, None for one that adds nothing."""
    active, merged = module.routing.active, module.routing.merged
    if isinstance(active, tuple):
        # An adapter that is merged runs for all rows already.
        names: list[str | None] = [None if merged else name for name, _, _ in packing.spans]
        return names or [None]
    return [None if active in merged else active]


def _plain_update(branch: Branch) -> LowRank | None:
    """The only update of a layer, if it is s B A x and nothing else."""
    updates = branch.updates()
    if branch.bias is not None or len(updates) != 1 or not updates[0].fusable:
        return None
    update = updates[0]
    return None if update.rows is not None or update.under_B is not None else update


def _is_its_own(module: nn.Module) -> bool:
    """Whether its forward is not the one that was read: hooked, or trained beside."""
    return isinstance(module, Wrapper) or _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks)
