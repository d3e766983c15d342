"""LoRA (Hu et al. 2021) as a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import attach
from lorakit.adapters.attachments import adapted_layers, overridden_modules
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError
from lorakit.formats.peft import save_adapter
from lorakit.layers.adapted import module_key
from lorakit.methods.base import TrainableReport


class LoraMethod:
    """Low-rank updates beside a frozen base.

    Args:
        spec: the adapter to learn.
        adapter_name: its name on the model.
    """

    name = "lora"

    def __init__(self, spec: LoraSpec, adapter_name: str = "default") -> None:
        self.spec = spec
        self.adapter_name = adapter_name

    def attach(self, model: nn.Module) -> TrainableReport:
        """Attach the adapter; see `lorakit.adapters.attach.attach`."""
        plan = attach(model, self.spec, self.adapter_name)
        return TrainableReport(
            num_trainable=plan.num_params(),
            num_total=sum(p.numel() for p in model.parameters()),
            sites=tuple(s.name for s in plan.sites) + tuple(o.module for o in plan.overrides),
            notes=plan.notes,
        )

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's parameters: `<module>.<index>.lora_A` and so on."""
        key = module_key(self.adapter_name)
        found: dict[str, Tensor] = {}
        for layer in adapted_layers(model):
            if key in layer.factors:
                for name, parameter in layer.factors[key].named_parameters():
                    found[f"{layer.name}.{name}"] = parameter
        for module in overridden_modules(model):
            if key in module.overrides:
                for name, parameter in module.overrides[key].named_parameters():
                    found[f"{module.name}.{name}"] = parameter
        return found

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the attached adapter, in place and bit for bit.

        Raises:
            AdapterFileError: the state is not this adapter's, all differences listed.
        """
        mine = self.state(model)
        problems = [f"missing: {name}" for name in mine if name not in state]
        problems += [f"extra: {name}" for name in state if name not in mine]
        problems += [
            f"misshapen: {name}: expected {tuple(mine[name].shape)}, found {tuple(value.shape)}"
            for name, value in state.items()
            if name in mine and mine[name].shape != value.shape
        ]
        if problems:
            raise AdapterFileError(
                "the checkpoint does not fit this adapter",
                found="\n".join(problems[:12]),
                remedy="resume with the configuration the checkpoint was made with",
            )
        with torch.no_grad():
            for name, value in state.items():
                mine[name].copy_(value)

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write the adapter in PEFT's layout, its passport beside."""
        facts = {"method": self.name, **passport}
        save_adapter(model, path, self.adapter_name, passport=facts, replace=True)
