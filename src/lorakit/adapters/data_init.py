"""Starts taken from data: EVA (the layers' inputs) and LoRA-GA (the weights' gradients)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import use
from lorakit.adapters.attachments import adapted_layers, refuse_merged, require_attached
from lorakit.adapters.spec import DATA_INITS
from lorakit.adapters.state import data_was_seen
from lorakit.adapters.targets import bare_model
from lorakit.adapters.watches import GradientWatch, InputWatch, Watch, watching
from lorakit.errors import DataError, StateError
from lorakit.layers.adapted import AdaptedLayer
from lorakit.layers.low_rank import LowRank, take_rows
from lorakit.layers.updates import fresh_norms
from lorakit.math.inits import lora_ga

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_SEED = 0


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model computes from the batch's labels."""
    return model(**batch).loss


def initialise_from_data(
    model: nn.Module,
    name: str,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Loss = own_loss,
) -> int:
    """Give an adapter with init "eva" or "lora_ga" its start; the model's output stays the base's.

    EVA (arXiv 2410.07170) takes A from the leading directions of each layer's inputs, B = 0; tokens
    that `attention_mask` leaves out do not count. LoRA-GA (arXiv 2407.05000) takes both factors
    from the gradient of the mean loss with respect to each adapted weight, kept in float32: the
    memory of those weights once more. The base runs in eval mode, without the adapter; the random
    state is left as it was. Mutates the adapter.

    Args:
        model: the adapter is attached to it.
        name: the adapter.
        batches: what the model takes as keywords, on its device; with labels for LoRA-GA.
        loss: how LoRA-GA makes a loss of the model and a batch.

    Returns:
        The number of batches seen.

    Raises:
        StateError: no such adapter, one that starts otherwise, or one that has its start.
        DataError: no batch, or too few different tokens for the rank.
    """
    model = bare_model(model)
    plan = require_attached(model, name)
    refuse_merged(model)
    layers = [layer for layer in adapted_layers(model) if layer.branch_of(name) is not None]
    waiting = [u for layer in layers for u in _updates(layer, name) if u.awaits_data]
    if not waiting:
        raise StateError(
            "this adapter does not wait for data",
            where=name,
            expected=f"init: {' or '.join(sorted(DATA_INITS))}, not yet trained or loaded",
            found=f"init: {plan.spec.init}",
        )
    device = waiting[0].lora_A.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        if plan.spec.init == "eva":
            num_batches = _eva(model, name, layers, batches)
        else:
            num_batches = _lora_ga(model, name, layers, batches, loss)
    data_was_seen(model, name)
    return num_batches


def _updates(layer: AdaptedLayer, name: str) -> list[LowRank]:
    branch = layer.branch_of(name)
    return [] if branch is None else branch.updates()


@contextmanager
def _watching(model: nn.Module, watches: Mapping[AdaptedLayer, Watch]) -> Iterator[None]:
    """The base in eval mode with each layer watched; modes and hooks as before afterwards."""
    with use(model, None), watching(model, {la.base: watch for la, watch in watches.items()}):
        yield


def _eva(
    model: nn.Module,
    name: str,
    layers: list[AdaptedLayer],
    batches: Iterable[Mapping[str, Any]],
) -> int:
    watches = {la: InputWatch(max(u.lora_A.shape[0] for u in _updates(la, name))) for la in layers}
    count = 0
    with _watching(model, watches), torch.no_grad():
        for batch in batches:
            for watch in watches.values():
                watch.mask = batch.get("attention_mask")
            model(**{key: value for key, value in batch.items() if key != "labels"})
            count += 1
    starts: list[tuple[LowRank, Tensor]] = []
    for layer, watch in watches.items():
        directions = watch.sketch.directions()
        if directions is None:
            raise _too_little(layer, count, watch.sketch.num)
        starts += [(u, directions[: u.lora_A.shape[0]]) for u in _updates(layer, name)]
    with torch.no_grad():
        for update, A in starts:
            update.lora_A.copy_(A)
    return count


def _lora_ga(
    model: nn.Module,
    name: str,
    layers: list[AdaptedLayer],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss,
) -> int:
    watches = {layer: GradientWatch() for layer in layers}
    count = 0
    with _watching(model, watches), torch.enable_grad():
        for batch in batches:
            loss(model, batch).backward()
            count += 1
    gradients: list[tuple[AdaptedLayer, Tensor]] = []
    for layer, watch in watches.items():
        if watch.total is None or not bool(watch.total.any()):
            raise _too_little(layer, count, 2 * _updates(layer, name)[0].lora_A.shape[0])
        gradients.append((layer, watch.total))
    with torch.no_grad():
        for layer, total in gradients:
            for update in _updates(layer, name):
                A, B = lora_ga(take_rows(total, update.rows), update.lora_A.shape[0])
                update.lora_A.copy_(A)
                update.lora_B.copy_(B)
                update.start_here()
                if update.magnitude is not None:
                    update.magnitude.copy_(fresh_norms(update, layer))
    return count


def _too_little(layer: AdaptedLayer, num_batches: int, num_directions: int) -> DataError:
    return DataError(
        "the data says too little to start this adapter from",
        where=layer.name,
        expected=f"at least {num_directions} different directions",
        found=f"fewer, in {num_batches} batches",
        remedy="give more batches, lower the rank, or use init: gaussian",
    )
