"""A frozen linear layer and its adapter where no gradient is asked for.

At one token per step the products are tiny and what counts is the number of operations: the base's
own forward, then y += s (x A^T) B^T as two products, the second added into the base's fresh output.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.layers.low_rank import Branch, LowRank


def added_in_place(base: nn.Module, branch: Branch, x: Tensor) -> Tensor | None:
    """The layer's output with one adapter's updates, or None where the general path is needed.

    Only where the base's output is a new tensor that nobody else holds: a plain layer without
    hooks, outside of autocast.

    Args:
        base: the frozen layer.
        branch: what the adapter does there.
        x: (..., in), the layer's input.
    """
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return None
    if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return None
    # The tables themselves: this runs once per layer and token, and nn.Module's look-ups add up.
    inside = branch._modules["parts"]
    if inside is None or branch._parameters.get("bias") is not None:
        return None
    updates = cast(list[LowRank], list(inside._modules.values()))
    if not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return None
    if not all(map(_is_simple, updates)):
        return None
    if kind is nn.Linear:
        own = base._parameters
        y = F.linear(x, cast(Tensor, own["weight"]), own["bias"])
    else:
        y = base.forward(x)
    if not y.is_contiguous():
        return None
    if x.numel() == x.shape[-1]:
        return _one_token(updates, x, y)
    flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for update in updates:
        down, up = _factors(update, x.dtype)
        rows = update.rows
        mine = out if rows is None else out[:, rows.start : rows.start + up.shape[0]]
        mine.addmm_(F.linear(flat, down), up.t(), alpha=update.scaling)
    return y


def _one_token(updates: list[LowRank], x: Tensor, y: Tensor) -> Tensor:
    """The same for one position: products of a matrix and a vector."""
    flat, out = x.view(-1), y.view(-1)
    for update in updates:
        down, up = _factors(update, x.dtype)
        rows = update.rows
        mine = out if rows is None else out[rows.start : rows.start + up.shape[0]]
        mine.addmv_(up, down.mv(flat), alpha=update.scaling)
    return y


def _factors(update: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in the dtype of the activations."""
    table = cast(dict[str, Tensor], update._parameters)
    down, up = table["lora_A"], table["lora_B"]
    if update.singular is not None:
        down = update.down
    if down.dtype != dtype:
        down, up = down.to(dtype), up.to(dtype)
    return down, up


def _is_simple(update: LowRank) -> bool:
    """Whether the update is s B A x on the input as it is, over one stretch of the output."""
    if update.training and update.dropout:
        return False
    frozen = update._buffers
    if frozen["start_B"] is not None or frozen["under_B"] is not None:
        return False
    if update.magnitude is not None:
        return False
    return not update.awaits_data and (update.rows is None or update.rows.count == 1)
