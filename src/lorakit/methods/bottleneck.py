"""Bottleneck adapters as methods: houlsby, lin, pfeiffer and adapterdrop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.adapters.attachments import outer_modules, places
from lorakit.adapters.plan import modules_beside
from lorakit.adapters.saving import save_learned_only
from lorakit.adapters.targets import base_modules
from lorakit.errors import MergeError, SpecError
from lorakit.layers.bottleneck import (
    Activation,
    Bottleneck,
    BottleneckSite,
    DropAtRandom,
    Switch,
    Where,
    num_bottleneck_params,
)
from lorakit.methods.base import TrainableReport
from lorakit.methods.beside import refuse_beside
from lorakit.methods.bottleneck_spec import AdapterDropSpec, BottleneckSpec
from lorakit.methods.chosen import Choice, ChosenParameters
from lorakit.methods.in_place import base_parameters, parameters_beside, require_own
from lorakit.models.blocks import Block, transformer_blocks

Design = Literal["houlsby", "lin", "pfeiffer"]

_PUBLISHED: dict[Design, Activation] = {"houlsby": "gelu", "lin": "relu", "pfeiffer": "relu"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one adapter goes."""

    module: str
    where: Where
    block: int
    width: int


class BottleneckMethod(ChosenParameters):
    """One design of bottleneck adapters; |Theta| = L_adpt (2 d r + r + d) + 2 L_LN d.

    - houlsby (Houlsby et al. 2019): two per block, y + A(y) at the outputs of attention and MLP,
      before the residual.
    - lin (Lin et al. 2020): one per block, y + A(LN(y)) at the block's output, LN being its own.
    - pfeiffer (Pfeiffer et al. 2021): one per block, LN(s + A(LN(s))) where the block ends with the
      norm LN of a residual s (BERT); s + A(s) where it ends with the residual (decoders).

    Args:
        design: which.
        spec: its options.
    """

    def __init__(self, design: Design, spec: BottleneckSpec | AdapterDropSpec) -> None:
        super().__init__(spec)
        self.name = design if isinstance(spec, BottleneckSpec) else "adapterdrop"
        self.design: Design = design
        self.spec = spec
        self._switch = Switch()
        self._sites: list[BottleneckSite] = []

    def choose(self, model: nn.Module) -> Choice:
        """Where the adapters go, and what of the base is trained beside; pure.

        Raises:
            SpecError: a block that the model does not have, or more dropped than there are.
            TargetError: unknown blocks, or a name in also_train that matches nothing.
        """
        blocks = transformer_blocks(model)
        found = self._places(blocks)
        names = self._norm_parameters(model, blocks, found)
        beside = parameters_beside(model, self.spec.also_train)
        names += [name for name in beside if name not in names]
        sites = modules_beside(self.spec.also_train, base_modules(model))
        return Choice(
            names=tuple(names),
            sites=(*(f"{place.module}.adapter" for place in found), *names),
            notes=self._notes(blocks, found),
            left_out=tuple(site.module for site in sites),
            added={f"{place.module}.adapter": self._num_params(place) for place in found},
        )

    def attach(self, model: nn.Module) -> TrainableReport:
        """Freeze the base and put the adapters in; the output is unchanged, A being zero."""
        refuse_beside(model, self.name)
        found = self._places(transformer_blocks(model))
        report = super().attach(model)
        modules, holders = base_modules(model), places(outer_modules(model))
        for place in found:
            base = modules[place.module]
            site = BottleneckSite(
                base,
                self._adapter(next(chain(base.parameters(), model.parameters())), place),
                switch=self._switch,
                block=place.block,
                where=place.where,
                name=place.module,
            )
            for parent, attribute in holders[id(base)]:
                setattr(parent, attribute, site)
            self._sites.append(site)
        if isinstance(self.spec, AdapterDropSpec) and self.spec.at_random:
            model.register_forward_pre_hook(DropAtRandom(self._switch, self.spec.drop_first))
        save_learned_only(model, self)
        return report

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """`<module>.adapter.down.weight` and so on, and what is trained beside."""
        found: dict[str, Tensor] = {}
        for site in self._sites:
            for name, parameter in site.adapter.named_parameters():
                found[f"{site.name}.adapter.{name}"] = parameter
        return {**found, **super().state(model)}

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base alone inside the block."""
        before = self._switch.on
        with super().disabled(model):
            self._switch.on = False
            try:
                yield
            finally:
                self._switch.on = before

    @contextmanager
    def dropped(self, model: nn.Module, num_blocks: int) -> Iterator[None]:
        """Without the adapters of the first blocks inside: AdapterDrop when it is used.

        Args:
            model: the model this method is attached to, in eval mode.
            num_blocks: how many blocks, counted from the input, run without adapters.

        Raises:
            SpecError: not a number of blocks this model has.
        """
        num_all = len(transformer_blocks(model))
        if not 0 <= num_blocks <= num_all:
            raise SpecError(
                "so many blocks cannot be dropped",
                where="num_blocks",
                expected=f"0 to {num_all}",
                found=str(num_blocks),
            )
        before = self._switch.num_dropped
        self._switch.num_dropped = num_blocks
        try:
            yield
        finally:
            self._switch.num_dropped = before

    def merge(self, model: nn.Module) -> None:
        """Always refused.

        Raises:
            MergeError: the reason.
        """
        raise MergeError(
            "bottleneck adapters cannot be merged: the nonlinearity between their two matrices has "
            "no form in the base's linear layers",
            where=self.name,
            remedy="keep the base and the method's directory beside each other, or learn lora, "
            "which merges",
        )

    def _places(self, blocks: list[Block]) -> list[_Place]:
        found: list[_Place] = []
        for number in self._numbers(len(blocks)):
            block = blocks[number]
            if self.design == "houlsby":
                targets: list[tuple[str, Where]] = [
                    (block.attention_output, "module"),
                    (block.mlp_output, "module"),
                ]
            elif self.design == "pfeiffer" and block.output_norm is not None:
                targets = [(block.output_norm, "norm")]
            else:
                targets = [(block.name, "block")]
            found += [_Place(name, where, number, block.width) for name, where in targets]
        return found

    def _numbers(self, num_blocks: int) -> list[int]:
        """The blocks that get adapters, first to last."""
        if isinstance(self.spec, BottleneckSpec):
            chosen = range(num_blocks) if self.spec.blocks is None else sorted(self.spec.blocks)
            beyond = [number for number in chosen if number >= num_blocks]
            if beyond:
                raise SpecError(
                    "the model has no such block",
                    where="blocks",
                    expected=f"0 to {num_blocks - 1}",
                    found=", ".join(map(str, beyond)),
                )
            return list(chosen)
        if self.spec.drop_first >= num_blocks:
            raise SpecError(
                "no block would be left with adapters",
                where="drop_first",
                expected=f"1 to {num_blocks - 1}, for the {num_blocks} blocks of this model",
                found=str(self.spec.drop_first),
            )
        return list(range(0 if self.spec.at_random else self.spec.drop_first, num_blocks))

    def _norm_parameters(
        self, model: nn.Module, blocks: list[Block], found: list[_Place]
    ) -> list[str]:
        if not self.spec.train_layer_norms:
            return []
        norms = {norm for n in {p.block for p in found} for norm in blocks[n].norms}
        names = [n for n in base_parameters(model) if n.rpartition(".")[0] in norms]
        require_own(model, names)
        return names

    def _notes(self, blocks: list[Block], found: list[_Place]) -> tuple[str, ...]:
        if self.design != "houlsby" or not any(blocks[place.block].parallel for place in found):
            return ()
        return (
            "attention and MLP of this architecture run beside each other: each adapter follows "
            "its own half, and the MLP's does not see what attention's added",
        )

    @property
    def _with_norm(self) -> bool:
        return self.design == "lin"

    def _num_params(self, place: _Place) -> int:
        size = self.spec.bottleneck
        return num_bottleneck_params(place.width, size, with_norm=self._with_norm)

    def _adapter(self, beside: Tensor, place: _Place) -> Bottleneck:
        # A quantized weight is stored in whole numbers; promotion makes float32 of those too.
        return Bottleneck(
            place.width,
            self.spec.bottleneck,
            activation=self.spec.activation or _PUBLISHED[self.design],
            with_norm=self._with_norm,
            device=beside.device,
            dtype=torch.promote_types(beside.dtype, torch.float32),
        )
