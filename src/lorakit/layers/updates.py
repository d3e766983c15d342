"""The update rules: what A, B and the other learned tensors do to a layer's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.layers.kinds import as_matrix
from lorakit.layers.low_rank import (
    Host,
    LowRank,
    UpdateRule,
    activation_dtype,
    scaled_rows,
    take_rows,
)
from lorakit.math.dora import gain, row_norms
from lorakit.weights.storage import base_weight


class LoraRule:
    """W' = W0 + s B A (Hu et al. 2021, eq. 3).

    With a start W0 + s (B A - B0 A0); with an update beneath W0 + s B A + s1 B1 A1, of which
    dropout sees the first product alone.
    """

    name = "lora"

    def change(self, update: LowRank, host: Host, x: Tensor, y: Tensor) -> Tensor:
        """S B A x."""
        B = scaled_rows(update.lora_B, update.scaling, activation_dtype(x, y))
        product = update.branch(host, _dropped(update, x), B)
        start = update.start_branch(host, x, update.scaling)
        if start is not None:
            product = product - start
        under = update.under_branch(host, x)
        return (product if under is None else product + under).to(y.dtype)


class DoraRule:
    """W' = m (W0 + s B A) / ||W0 + s B A||_c, the norm without gradient (Liu et al. 2024, eq. 5).

    With g = m / ||W0 + s B A|| the output is g W0 x + g s B A x + b: the bias is not scaled. With
    dropout D the change is (g - 1) W0 D(x) + g s B A D(x), as in PEFT: it costs the base's product
    a second time.
    """

    name = "dora"

    def change(self, update: LowRank, host: Host, x: Tensor, y: Tensor) -> Tensor:
        """(g - 1) W0 x + g s B A x."""
        kind, base = host.kind, host.base
        g = gain(magnitude_of(update), current_norms(update, host))
        dropped = _dropped(update, x)
        if dropped is not x:
            y = base(dropped)
        bias = kind.bias(base)
        plain = y if bias is None else y - kind.per_output(bias)
        less_one = (g - 1).to(y.dtype)
        if update.rows is not None:
            less_one = update.rows.spread(less_one)
        scale = g * update.scaling
        B = scaled_rows(update.lora_B, scale, activation_dtype(x, y))
        product = update.branch(host, dropped, B)
        if dropped is x:
            start = update.start_branch(host, x, scale)
        else:
            start = _start_with_dropout(update, host, (x, dropped), scale)
        if start is not None:
            product = product - start
        return kind.per_output(less_one) * plain + product.to(y.dtype)


def _start_with_dropout(
    update: LowRank, host: Host, inputs: tuple[Tensor, Tensor], scale: Tensor
) -> Tensor | None:
    """What to take off for B0 A0: it belongs to the base, which sees the input itself once."""
    x, dropped = inputs
    own = update.start_branch(host, x, update.scaling)
    gained = update.start_branch(host, dropped, scale - update.scaling)
    return None if own is None or gained is None else own + gained


LORA: UpdateRule = LoraRule()
DORA: UpdateRule = DoraRule()
RULES: dict[str, UpdateRule] = {rule.name: rule for rule in (LORA, DORA)}


def magnitude_of(update: LowRank) -> Tensor:
    """DoRA's m, (out,)."""
    if update.magnitude is None:
        raise TypeError("a DoRA update without its magnitude")
    return update.magnitude


def current_norms(update: LowRank, host: Host) -> Tensor:
    """||W0 + s B A||_c of the update's rows, (out,), no gradient; kept in eval mode only."""
    if update.training:
        return fresh_norms(update, host)
    sources = [host.base.get_parameter("weight"), update.lora_A, update.lora_B]
    if update.start_A is not None and update.start_B is not None:
        sources += [update.start_A, update.start_B]
    return update.norms.get(sources, lambda: fresh_norms(update, host))


def fresh_norms(update: LowRank, host: Host) -> Tensor:
    """The same, computed now."""
    # What is kept must also serve a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        matrix = as_matrix(host.kind, base_weight(host.base).read())
        A, B = update.effective()
        own = take_rows(matrix, update.rows)
        return row_norms(own, A.flatten(1), B.flatten(1), update.scaling)


def base_norms(host: Host) -> Tensor:
    """||W0||_c of every row of the base weight, (out,), float32."""
    matrix = as_matrix(host.kind, base_weight(host.base).read())
    no_A = matrix.new_zeros(1, matrix.shape[1])
    return row_norms(matrix, no_A, matrix.new_zeros(matrix.shape[0], 1), 0.0)


def _dropped(update: LowRank, x: Tensor) -> Tensor:
    if update.training and update.dropout and x.is_floating_point():
        return F.dropout(x, update.dropout)
    return x
