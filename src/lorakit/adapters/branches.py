"""The tensors of a new adapter at one layer, and where they start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.adapters.plan import Site
from lorakit.adapters.spec import DATA_INITS, NONZERO_INITS, LoraSpec
from lorakit.errors import SpecError
from lorakit.layers.adapted import AdaptedLayer
from lorakit.layers.kinds import as_matrix
from lorakit.layers.low_rank import Branch, LowRank, take_rows
from lorakit.layers.updates import RULES, fresh_norms
from lorakit.math.inits import olora, pissa
from lorakit.weights.storage import base_weight


def trainable_copy(parameter: Tensor) -> Tensor:
    """A copy to train: float32 unless the base is wider, on the base's device."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def new_branch(
    layer: AdaptedLayer, sites: Sequence[Site], spec: LoraSpec, *, fill: bool = True
) -> Branch:
    """The learned part of a new adapter at one layer, at its start.

    Args:
        layer: where it goes.
        sites: the layer's sites.
        spec: the request.
        fill: give A and B their start; False where the caller fills them at once.

    Raises:
        SpecError: DoRA on a weight with a row of zeros.
    """
    weight = layer.base.get_parameter("weight")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    parts: list[LowRank] = []
    for site in sites:
        shape_A, shape_B = layer.kind.factor_shapes(site.shape, site.r)
        lora_A = torch.empty(shape_A, dtype=dtype, device=weight.device)
        lora_B = torch.empty(shape_B, dtype=dtype, device=weight.device)
        if fill or site.update == "dora":
            layer.kind.init(lora_A, lora_B, spec.init)
        update = LowRank(
            lora_A,
            lora_B,
            scaling=site.scaling,
            rule=RULES[site.update],
            dropout=spec.dropout,
            rows=site.rows,
        ).train(layer.training)
        _start(layer, update, site, spec)
        if site.learns_values:
            _start_values(update)
        if site.update == "dora":
            update.magnitude = nn.Parameter(_first_norms(layer, update, site))
        parts.append(update)
    bias = trainable_copy(layer.base.get_parameter("bias")) if sites[0].bias else None
    return Branch(parts, bias)


def _start(layer: AdaptedLayer, update: LowRank, site: Site, spec: LoraSpec) -> None:
    """Give the factors a start that depends on the weight, or mark that data is to come."""
    update.awaits_data = spec.init in DATA_INITS
    if spec.init not in NONZERO_INITS:
        return
    matrix = as_matrix(layer.kind, base_weight(layer.base).read())
    if spec.init not in DATA_INITS and not matrix.is_meta:
        own = take_rows(matrix, site.rows)
        if spec.init == "olora":
            start = olora(own, site.r)
        else:
            start = pissa(own, site.r, site.scaling, fast=spec.init == "pissa_fast")
        with torch.no_grad():
            update.lora_A.copy_(start[0])
            update.lora_B.copy_(start[1])
    update.start_here()


def _start_values(update: LowRank) -> None:
    """AdaLoRA's start: P and Q orthonormal, where its penalty is 0, and lambda zero."""
    if not update.lora_A.is_meta:
        nn.init.orthogonal_(update.lora_A)
        nn.init.orthogonal_(update.lora_B)
    update.singular = nn.Parameter(update.lora_A.new_zeros(update.lora_A.shape[0]))


def _first_norms(layer: AdaptedLayer, update: LowRank, site: Site) -> Tensor:
    norms = fresh_norms(update, layer)
    num_empty = 0 if norms.is_meta else int((norms == 0).sum())
    if num_empty:
        raise SpecError(
            "DoRA needs a direction in every row of the weight, and a row of zeros has none",
            where=site.name,
            found=f"{num_empty} of {norms.numel()} rows are zero",
            remedy="leave this layer out of the targets, or use update: lora",
        )
    return norms
