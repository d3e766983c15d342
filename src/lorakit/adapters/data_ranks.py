"""Ranks chosen from data: the spread of the layers' inputs, or of the weights' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attachments import find_attachments
from lorakit.adapters.budget import budget_params, equal_rank
from lorakit.adapters.data_init import Loss, own_loss
from lorakit.adapters.plan import Site, plan_adapter
from lorakit.adapters.ranks import allocate, most_of, with_ranks
from lorakit.adapters.spec import MOVING, LoraSpec, require_chosen
from lorakit.adapters.targets import base_modules
from lorakit.adapters.watches import GradientWatch, InputWatch, watching
from lorakit.errors import DataError, SpecError, StateError
from lorakit.layers.low_rank import take_rows

_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenRanks:
    """What the data decided.

    Attributes:
        spec: the request with its ranks; `attach` takes it.
        ranks: site name -> rank.
        num_batches: how many were looked at.
    """

    spec: LoraSpec
    ranks: Mapping[str, int]
    num_batches: int


def choose_ranks(
    model: nn.Module,
    spec: LoraSpec,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Loss = own_loss,
) -> ChosenRanks:
    """Spend the budget of a spec with `r: auto` where the data says that it gains most.

    "eva" (after EVA, arXiv 2410.07170): a direction of a layer's inputs gains its share of their
    sum of squares. "gradient": a direction of a weight's gradient gains the square of its singular
    value, the part of the gradient that one more rank can follow. Both are divided by what one more
    rank costs there. The model runs in eval mode; its modes, hooks and the random state are as
    before afterwards.

    Args:
        model: the base, nothing attached; not changed.
        spec: with r "auto", a budget, and ranks "eva" or "gradient" ("uniform" needs no data).
        batches: what the model takes as keywords, on its device; with labels for "gradient".
        loss: how "gradient" makes a loss of the model and a batch.

    Raises:
        SpecError: the ranks are not to be chosen, the budget is too small, or a target is no
            linear layer.
        StateError: something is attached.
        DataError: no batch, or no gradient.
    """
    if spec.r != "auto":
        raise SpecError("the ranks are given", where="r", expected="auto", found=repr(spec.r))
    if spec.ranks == MOVING:
        require_chosen(spec)
    if find_attachments(model) is not None:
        raise StateError(
            "ranks are chosen before anything is attached", remedy="detach the adapters first"
        )
    sites = plan_adapter(model, spec).sites
    num_params = budget_params(spec.budget or 0)
    equal = equal_rank(sites, num_params)
    if spec.ranks == "uniform":
        ranks = {site.name: equal for site in sites}
        return ChosenRanks(spec=with_ranks(spec, ranks, equal), ranks=ranks, num_batches=0)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        if spec.ranks == "eva":
            gains, num_batches = _input_gains(model, sites, equal, batches)
        else:
            gains, num_batches = _gradient_gains(model, sites, batches, loss)
    ranks = allocate(sites, gains, num_params)
    return ChosenRanks(spec=with_ranks(spec, ranks, equal), ranks=ranks, num_batches=num_batches)


def _input_gains(
    model: nn.Module, sites: Sequence[Site], equal: int, batches: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], int]:
    modules = base_modules(model)
    most: dict[str, int] = {}
    for site in sites:
        most[site.module] = max(most.get(site.module, 1), most_of(site, equal))
    watches = {name: InputWatch(num) for name, num in most.items()}
    count = 0
    with watching(model, {modules[n]: w for n, w in watches.items()}), torch.no_grad():
        for batch in batches:
            for watch in watches.values():
                watch.mask = batch.get("attention_mask")
            model(**{key: value for key, value in batch.items() if key != "labels"})
            count += 1
    gains: dict[str, Tensor] = {}
    for site in sites:
        watch = watches[site.module]
        values = watch.sketch.singular_values()
        if values is None or not watch.total:
            raise _nothing_seen(site, count)
        gains[site.name] = values.square().double() / watch.total
    return gains, count


def _gradient_gains(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Mapping[str, Any]], loss: Loss
) -> tuple[dict[str, Tensor], int]:
    modules = base_modules(model)
    watches = {site.module: GradientWatch() for site in sites}
    frozen = [p for p in model.parameters() if p.requires_grad]
    count = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with watching(model, {modules[n]: w for n, w in watches.items()}), torch.enable_grad():
            for batch in batches:
                loss(model, batch).backward()
                count += 1
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    gains: dict[str, Tensor] = {}
    for site in sites:
        total = watches[site.module].total
        if total is None or not bool(total.any()):
            raise _nothing_seen(site, count)
        gains[site.name] = torch.linalg.svdvals(take_rows(total, site.rows)).square().double()
    return gains, count


def _nothing_seen(site: Site, num_batches: int) -> DataError:
    return DataError(
        "the data says nothing about this layer, so no rank can be chosen for it",
        where=site.name,
        expected="inputs and gradients that are not zero",
        found=f"none in {num_batches} batches",
        remedy="give more batches, or use ranks: uniform",
    )
