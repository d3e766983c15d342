"""LoRA (Hu et al. 2021) as a method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach, detach, use
from lorakit.adapters.attachments import adapted_layers, attachments_of
from lorakit.adapters.bind import bind_adapter, plan_of_binding
from lorakit.adapters.fold import merge
from lorakit.adapters.moving import plan_moving
from lorakit.adapters.plan import AdapterPlan, plan_adapter
from lorakit.adapters.spec import MOVING, LoraSpec, require_chosen
from lorakit.adapters.stack import attach_stacked, plan_stacked
from lorakit.adapters.state import adapter_state, data_was_seen, load_in_place
from lorakit.formats.peft import save_adapter
from lorakit.methods.base import TrainableReport, one_group
from lorakit.weights.storage import num_params

# What the code of LoRA+ calls lr_embedding: fixed, because a one-hot input has no width to scale
# with.
LORA_PLUS_EMBEDDING_LR = 1e-6
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Beginning:
    """The saved adapter that a new one begins with.

    Attributes:
        adapter: as it was read.
        path: where it was read, for messages.
        beneath: it stays frozen beneath a new adapter; else it is trained further itself.
    """

    adapter: Adapter
    path: str
    beneath: bool

    @property
    def note(self) -> str:
        """What the user should know, in a sentence."""
        if self.beneath:
            return f"on top of the frozen adapter {self.path}; both are saved as one"
        return f"goes on training the adapter {self.path}, which stays as it is"


class LoraMethod:
    """Low-rank updates beside a frozen base.

    Args:
        spec: the adapter to learn.
        adapter_name: its name on the model.
        lora_plus_ratio: LoRA+, lr_B = ratio * lr_A; None for one rate.
        begin: the saved adapter to begin with; None for a new one on the base. To go on training
            it, `spec` is `lorakit.adapters.stack.spec_to_continue`.
        moving_start: with ranks: adalora, see `lorakit.adapters.moving.plan_moving`.
    """

    name = "lora"

    def __init__(
        self,
        spec: LoraSpec,
        adapter_name: str = "default",
        *,
        lora_plus_ratio: float | None = None,
        begin: Beginning | None = None,
        moving_start: float = 1.5,
    ) -> None:
        self.spec = spec
        self.adapter_name = adapter_name
        self.lora_plus_ratio = lora_plus_ratio
        self.begin = begin
        self.moving_start = moving_start

    def options(self) -> dict[str, Any]:
        """The spec's fields."""
        return self.spec.to_dict()

    def plan(self, model: nn.Module) -> TrainableReport:
        """Resolve the spec; see `lorakit.adapters.plan.plan_adapter` and `adapters.stack`."""
        return self._report(model, self._plan(model))

    def attach(self, model: nn.Module) -> TrainableReport:
        """Attach the adapter; see `lorakit.adapters.attach.attach`."""
        if self.spec.ranks != MOVING and not next(model.parameters()).is_meta:
            # A model without numbers is only counted: the equal rank has the same size.
            require_chosen(self.spec)
        plan = self._plan(model)
        report = self._report(model, plan)
        if self.begin is None:
            attach(model, plan, self.adapter_name)
        elif self.begin.beneath:
            attach_stacked(model, plan, self.begin.adapter, self.adapter_name)
        else:
            saved = replace(self.begin.adapter, spec=self.spec)
            bind_adapter(model, saved, self.adapter_name)
            # What is saved from here on is another adapter, with a passport of its own.
            attachments_of(model).passports.pop(self.adapter_name)
        return report

    def _plan(self, model: nn.Module) -> AdapterPlan:
        if self.spec.ranks == MOVING:
            return plan_moving(model, self.spec, self.moving_start)
        if self.begin is None:
            return plan_adapter(model, self.spec)
        if self.begin.beneath:
            return plan_stacked(model, self.spec, self.begin.adapter)
        return plan_of_binding(model, replace(self.begin.adapter, spec=self.spec))

    def _report(self, model: nn.Module, plan: AdapterPlan) -> TrainableReport:
        return TrainableReport(
            num_trainable=plan.num_params(),
            num_total=num_params(model) + plan.num_params(),
            sites=tuple(s.name for s in plan.sites) + tuple(o.module for o in plan.overrides),
            notes=plan.notes if self.begin is None else (*plan.notes, self.begin.note),
            ranks={site.name: site.r for site in plan.sites},
        )

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors: `<module>.parts.<index>.lora_A` and so on."""
        return adapter_state(model, self.adapter_name)

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the attached adapter, in place and bit for bit."""
        load_in_place(self.state(model), state)
        data_was_seen(model, self.adapter_name)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """One group, or LoRA+'s (Hayou et al. 2024, and their code).

        lora_A and whole matrices at lr; lora_B and vectors at ratio * lr; both factors of an
        embedding at 1e-6 whatever the ratio.
        """
        if self.lora_plus_ratio is None:
            return one_group(self, model, lr)
        embeddings = {layer.name for layer in adapted_layers(model) if layer.kind.name == EMBEDDING}
        rates = {lr: [], lr * self.lora_plus_ratio: [], LORA_PLUS_EMBEDDING_LR: []}
        for name, parameter in self.state(model).items():
            if not parameter.requires_grad:
                continue  # (A0, B0) of a start
            if any(name.startswith(f"{layer}.") for layer in embeddings):
                rates[LORA_PLUS_EMBEDDING_LR].append(parameter)
            elif name.endswith("lora_B") or parameter.ndim == 1:
                rates[lr * self.lora_plus_ratio].append(parameter)
            else:
                rates[lr].append(parameter)
        return [{"params": group, "lr": rate} for rate, group in rates.items() if group]

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base alone inside the block."""
        with use(model, None):
            yield

    def merge(self, model: nn.Module) -> None:
        """W = W0 + s B A in the base's weights; the wrappers come off.

        Raises:
            MergeError: a merged weight would not be finite.
        """
        merge(model, self.adapter_name, keep=False)
        detach(model, self.adapter_name)

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write the adapter in PEFT's layout, its passport beside."""
        facts = {"method": self.name, **passport}
        save_adapter(model, path, self.adapter_name, passport=facts, replace=True)
