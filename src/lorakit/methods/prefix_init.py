"""Where learned special positions start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.methods.prefix_site import PrefixSite
from lorakit.methods.prefix_spec import PrefixInit
from lorakit.models.label_head import evaluating

_ROWS_FOR_VARIANCE = 1024


def start_embeddings(site: PrefixSite, count: int, init: PrefixInit) -> Tensor:
    """Embeddings to start from, (count, d), as the model's embedding layer gives them.

    Drawn from torch's global generator of the CPU, so a seed gives the same on every device.
    """
    vocabulary = site.embedding.shape[0]
    rows = count if init == "vocabulary" else min(vocabulary, _ROWS_FOR_VARIANCE)
    chosen = torch.randperm(vocabulary)[:rows]
    if rows > vocabulary:
        chosen = torch.randint(vocabulary, (rows,))
    with torch.no_grad():
        # Through the layer and not from its weight: Gemma's scales what it looks up.
        found = site.backbone.get_input_embeddings()(chosen.to(site.embedding.device))
    if init == "vocabulary":
        return found
    noise = torch.randn(count, found.shape[1]).to(found)
    return noise * found.float().std().to(found)


def start_activations(site: PrefixSite, embeddings: Tensor) -> Tensor:
    """The inputs of all blocks when these embeddings alone run through the base.

    Args:
        site: the model; it is run once, without dropout, and not changed.
        embeddings: (count, d).

    Returns:
        (L, count, d_model).
    """
    seen = [_Input() for _ in site.layers]
    with _watching(site, seen), evaluating(site.model), torch.no_grad():
        site.backbone(inputs_embeds=embeddings[None], use_cache=False)
    return torch.stack([found.only() for found in seen])


@dataclass
class _Input:
    found: list[Tensor] = field(default_factory=list[Tensor])

    def before(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found.append(args[0] if args else kwargs["hidden_states"])

    def after(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self.found.append(output)

    def only(self) -> Tensor:
        (hidden,) = self.found
        return hidden[0]


@contextmanager
def _watching(site: PrefixSite, seen: list[_Input]) -> Iterator[None]:
    handles = [
        place.module.register_forward_hook(watch.after)
        if place.behind
        else place.module.register_forward_pre_hook(watch.before, with_kwargs=True)
        for place, watch in zip(site.layers, seen, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
