"""Parameters of the base itself, trained where they are; what they were is kept beside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakit.adapters.plan import modules_beside
from lorakit.adapters.targets import base_modules
from lorakit.errors import StateError, TargetError


class InPlace:
    """The trained parameters of one model, by name, and the base's values of them.

    Args:
        keep: keep a copy of the base's values, so that the base can be run again.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._trained: dict[str, nn.Parameter] = {}
        self._base: dict[str, Tensor] = {}

    def start(self, model: nn.Module, names: Iterable[str]) -> None:
        """Freeze the whole model but these parameters; mutates it, changes no value.

        Args:
            model: the base; what a method adds to it is added afterwards.
            names: parameters of it, see `base_parameters`.

        Raises:
            StateError: the method is on a model already.
        """
        if self._trained:
            raise StateError(
                "this method is attached already",
                where=type(model).__name__,
                remedy="make another one with build_method(name, options)",
            )
        freeze(model)
        for name, parameter in each_once(model, names).items():
            parameter.requires_grad_(True)
            self._trained[name] = parameter
            if self.keep:
                self._base[name] = parameter.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """Name -> live parameter."""
        return dict(self._trained)

    def changes(self) -> dict[str, Tensor]:
        """Name -> learned minus base, float32 or wider; needs the kept values."""
        changes: dict[str, Tensor] = {}
        for name, base in self._base.items():
            wide = torch.promote_types(base.dtype, torch.float32)
            live = self._trained[name].detach()
            changes[name] = live.to(wide) - base.to(device=live.device, dtype=wide)
        return changes

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base's values inside the block; the learned ones come back, bit for bit.

        Raises:
            StateError: the base's values were not kept.
        """
        if self._trained and not self.keep:
            raise StateError(
                "the base's weights were not kept, so the method cannot be switched off",
                expected="keep_base: true, at the price of the base's memory once more",
                remedy="set keep_base, or load the base beside",
            )
        learned = {name: parameter.data for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            base = self._base[name]
            parameter.data = base.to(device=parameter.device, dtype=parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.data = learned[name]

    def release(self) -> None:
        """Forget the model: the learned values are its own from now on."""
        self._trained.clear()
        self._base.clear()


def freeze(model: nn.Module) -> None:
    """Let nothing of the model require a gradient; mutates it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by name, in the model's order; a shared one under all its names."""
    return {
        f"{module_name}.{name}" if module_name else name: parameter
        for module_name, module in base_modules(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def each_once(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """These parameters of the base, a shared one under the first of its names."""
    found = base_parameters(model)
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name in names:
        chosen.setdefault(id(found[name]), (name, found[name]))
    return dict(chosen.values())


def parameters_beside(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The parameters that `also_train` names; changes nothing and works on the meta device.

    Raises:
        TargetError: a pattern matches nothing, or a module that shares a weight with another.
    """
    modules = base_modules(model)
    sites = modules_beside(patterns, modules)
    names = [f"{site.module}.{name}" for site in sites for name in site.shapes]
    require_own(model, names)
    return names


def require_own(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse parameters that something outside of these names uses too.

    Raises:
        TargetError: training them would change that other place.
    """
    by_name = base_parameters(model)
    holders: dict[int, list[str]] = {}
    for name, parameter in by_name.items():
        holders.setdefault(id(parameter), []).append(name)
    chosen = set(names)
    for name in chosen:
        others = [other for other in holders[id(by_name[name])] if other not in chosen]
        if others:
            raise TargetError(
                "this weight is shared: training it would also change the other place",
                where=name,
                found=f"the same parameter as {', '.join(others)}",
                remedy="train both, or take lora, which gives each place an update of its own",
            )
