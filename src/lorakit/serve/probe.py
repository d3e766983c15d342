"""Which layers see a batch's rows in their order: only there can each row have its own adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.targets import base_modules
from lorakit.layers.kinds import kind_of

_log = logging.getLogger("lorakit.serve")
_LENGTH = 5
# Sums of one row computed at another place of the batch differ by rounding alone.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.05


def layers_out_of_order(model: PreTrainedModel) -> frozenset[str]:
    """Layers that are given tokens of the batch's rows in another order, or some of them only.

    Experts of a mixture are such layers: each sees the tokens that were routed to it. Two rows run
    forwards and swapped; where a layer keeps rows in their order, what it sees is swapped too. What
    no token reached is counted to them if it stands beside such a layer, or is called an expert.

    Takes two forward passes of two short rows; changes nothing.

    Args:
        model: a base with nothing attached.
    """
    layers = {name: m for name, m in base_modules(model).items() if kind_of(m) is not None}
    generator = torch.Generator().manual_seed(0)
    width = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(width, (2, _LENGTH), generator=generator).to(model.device)
    try:
        with torch.inference_mode():
            seen = _seen(model, layers, ids)
            swapped = _seen(model, layers, ids.flip(0))
    except Exception:
        # A model that cannot be asked for two rows of tokens: what is called an expert is one.
        _log.exception("%s could not be tried with two rows", type(model).__name__)
        seen, swapped = {}, {}
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    odd = {
        name
        for name in seen.keys() | swapped.keys()
        if not _in_order(seen.get(name), swapped.get(name), tolerance)
    }
    beside = {_list_of(name) for name in odd} - {""}
    idle = layers.keys() - seen.keys() - swapped.keys()
    odd |= {name for name in idle if _list_of(name) in beside or "experts" in name.split(".")}
    return frozenset(odd)


def _seen(
    model: PreTrainedModel, layers: dict[str, nn.Module], ids: Tensor
) -> dict[str, list[Tensor]]:
    """Layer -> of each call, one number per entry of its input.

    A position's look-up for all rows at once, (1, positions), is in order by itself: left out.
    """
    found: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if not isinstance(x, Tensor):
            return
        if isinstance(module, nn.Embedding):
            if x.shape[0] != 1:
                found.setdefault(name, []).append(x.double())
            return
        found.setdefault(name, []).append(x.double().sum(-1))

    with _watching(layers.items(), note):
        if model.config.is_encoder_decoder:
            model(input_ids=ids, decoder_input_ids=ids)
        else:
            model(input_ids=ids)
    return found


@contextmanager
def _watching(layers: Iterable[tuple[str, nn.Module]], note: Any) -> Iterator[None]:
    def hook(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        note(name, module, given)

    handles = [m.register_forward_pre_hook(partial(hook, name)) for name, m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_order(seen: list[Tensor] | None, swapped: list[Tensor] | None, tolerance: float) -> bool:
    """Whether every call saw whole rows, and none of them the tokens in another order.

    Numbers that are others altogether say nothing: a router that was near a tie moves them.
    """
    if seen is None or swapped is None or len(seen) != len(swapped):
        return False
    for one, other in zip(seen, swapped, strict=True):
        count = one.numel()
        if count != other.numel() or count == 0 or count % (2 * _LENGTH):
            return False
        first, second = one.flatten(), other.reshape(2, -1).flip(0).flatten()
        near = tolerance * float(first.abs().max())
        if torch.allclose(first, second, rtol=0, atol=near):
            continue
        if torch.allclose(first.sort().values, second.sort().values, rtol=0, atol=near):
            return False
    return True


def _list_of(name: str) -> str:
    """The list of modules a layer stands in, by its last number: "mlp.experts" of mlp.experts.3.up.

    Empty where there is none.
    """
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: places[-1]]) if places else ""
