"""Prefix-embedding and prefix-layer tuning (Hu et al. 2021, section 5.1) as methods.

Prefix-embedding (PreEmbed) learns the embeddings of special tokens. Prefix-layer (PreLayer) learns
the activations there after every layer: what the layer before computed is replaced. The embedding
output and the outputs of all blocks but the last are replaced, which are the inputs of the L
blocks; the output of the last block is read at no prefix position, so nothing there could matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.identity import base_facts
from lorakit.adapters.occupied import occupy
from lorakit.adapters.plan import modules_beside
from lorakit.adapters.saving import save_learned_only
from lorakit.adapters.state import load_in_place
from lorakit.adapters.targets import base_modules
from lorakit.errors import MergeError, SpecError, StateError
from lorakit.layers.placement import Shape
from lorakit.layers.prefix import LayerInput, PrefixTokens, find_prefix
from lorakit.layers.prompts import GenerateBehindPrompt, LabelsSeen
from lorakit.methods.base import TrainableReport, one_group
from lorakit.methods.beside import refuse_beside
from lorakit.methods.files import passport_document, write_method
from lorakit.methods.in_place import InPlace, each_once, parameters_beside
from lorakit.methods.prefix_init import start_activations, start_embeddings
from lorakit.methods.prefix_site import PrefixSite, prefix_site
from lorakit.methods.prefix_spec import PrefixEmbeddingSpec, PrefixLayerSpec
from lorakit.methods.spec import spec_to_dict
from lorakit.weights.storage import num_params

_CHILD = "lorakit_prefix"


class PrefixMethod:
    """Learned special positions in front of and behind the prompt of a frozen model.

    Args:
        spec: how many; its class says whether in the first layer's input or in every layer's.
    """

    def __init__(self, spec: PrefixEmbeddingSpec | PrefixLayerSpec) -> None:
        self.spec = spec
        self._beside = InPlace()
        self._base: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """`prefix_embedding` or `prefix_layer`."""
        every_layer = isinstance(self.spec, PrefixLayerSpec)
        return "prefix_layer" if every_layer else "prefix_embedding"

    def options(self) -> dict[str, Any]:
        """The spec's fields."""
        return spec_to_dict(self.spec)

    def plan(self, model: nn.Module) -> TrainableReport:
        """Count the parameters: d (l_p + l_i), or L d (l_p + l_i).

        Raises:
            SpecError: more positions than the model's context has.
            TargetError: an architecture that is not known, or weights that cannot be trained.
        """
        return self._report(self._site(model))

    def attach(self, model: nn.Module) -> TrainableReport:
        """Freeze the base and put the special positions in front of every forward pass.

        Mutates `model`; its output changes at once, as the definition has it.

        Raises:
            StateError: something is attached already.
            SpecError, TargetError: see `plan`.
        """
        site = self._site(model)
        report = self._report(site)
        modules = modules_beside(self.spec.also_train, base_modules(model))
        self._base = base_facts(model, tuple(site.module for site in modules))
        self._beside.start(model, parameters_beside(model, self.spec.also_train))
        weight = site.embedding
        tokens = PrefixTokens(
            Shape(self.spec.prefix, self.spec.infix, causal=site.causal),
            site.positions,
            size=self._size(site),
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )
        if not weight.is_meta:
            values = start_embeddings(site, report.extra_positions, self.spec.init)
            if tokens.in_every_layer:
                values = start_activations(site, values)
            tokens.fill(values)
        _install(site, tokens)
        occupy(model, self.name)
        save_learned_only(model, self)
        return report

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """`prefix` and `infix`, (l, d) or (L, l, d), and what is trained beside."""
        return {**_attached(model).learned(), **self._beside.state()}

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the model, in place and bit for bit."""
        load_in_place(self.state(model), state)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """One group."""
        return one_group(self, model, lr)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base, without special positions, inside the block."""
        with _attached(model).disabled(), self._beside.disabled():
            yield

    def merge(self, model: nn.Module) -> None:
        """Always refused.

        Raises:
            MergeError: the reason.
        """
        raise MergeError(
            "a prefix cannot be merged: it is input of the model, not a change of its weights",
            where=self.name,
            remedy="load it beside the base with load_saved, or learn lora, which merges",
        )

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write lorakit.json and method.safetensors."""
        state = self.state(model)
        num_params = sum(value.numel() for value in state.values())
        facts = {**passport, "base": self._base}
        document = passport_document(self.name, self.options(), num_params, facts)
        write_method(path, document, state)

    def _site(self, model: nn.Module) -> PrefixSite:
        refuse_beside(model, self.name)
        site = prefix_site(model)
        num_special = self.spec.prefix + self.spec.infix
        if site.context is not None and num_special >= site.context:
            raise SpecError(
                "the special positions leave no room in the model's context",
                where="prefix and infix",
                expected=f"fewer than {site.context:,} together",
                found=f"{num_special:,}",
                remedy="take fewer of them",
            )
        return site

    def _size(self, site: PrefixSite) -> tuple[int] | tuple[int, int]:
        if isinstance(self.spec, PrefixLayerSpec):
            return (len(site.layers), site.width)
        return (site.embedding.shape[1],)

    def _report(self, site: PrefixSite) -> TrainableReport:
        names = parameters_beside(site.model, self.spec.also_train)
        beside = each_once(site.model, names)
        num_special = self.spec.prefix + self.spec.infix
        num_learned = num_special * math.prod(self._size(site))
        every_layer = isinstance(self.spec, PrefixLayerSpec)
        notes = [f"every row takes {num_special:,} more positions of the model's context"]
        if every_layer and self.spec.infix and site.causal:
            notes.append(
                "the first token of an answer is predicted at the last infix position, where every "
                "block's input is learned: only the last block sees the prompt there"
            )
        return TrainableReport(
            num_trainable=num_learned + sum(p.numel() for p in beside.values()),
            num_total=num_params(site.model) + num_learned,
            sites=(
                *([place.name for place in site.layers] if every_layer else [site.embedding_name]),
                *names,
            ),
            notes=tuple(notes),
            kept_bytes=sum(p.nbytes for p in beside.values()),
            extra_positions=num_special,
            in_base_dtype=bool(names),
        )


def _attached(model: nn.Module) -> PrefixTokens:
    tokens = find_prefix(model)
    if tokens is None:
        raise StateError(
            "no prefix is attached to this model",
            where=type(model).__name__,
            remedy="attach the method first",
        )
    return tokens


def _install(site: PrefixSite, tokens: PrefixTokens) -> None:
    site.model.add_module(_CHILD, tokens)
    site.backbone.register_forward_pre_hook(tokens.enter, with_kwargs=True)
    site.backbone.register_forward_hook(tokens.leave)
    for layer, place in enumerate(site.layers if tokens.in_every_layer else ()):
        hook = LayerInput(tokens, layer)
        if place.behind:
            place.module.register_forward_hook(hook.after)
        else:
            place.module.register_forward_pre_hook(hook.before, with_kwargs=True)
    if site.model.get_output_embeddings() is not None and site.causal:
        seen = LabelsSeen(tokens)
        site.model.register_forward_pre_hook(seen.enter, with_kwargs=True)
        site.model.register_forward_hook(seen.leave, always_call=True)
    if site.model.can_generate():
        vars(site.model)["generate"] = GenerateBehindPrompt(site.model, tokens)
