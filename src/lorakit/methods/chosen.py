"""Methods that train parameters the base has: which ones is all that differs between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.identity import base_facts
from lorakit.adapters.occupied import occupy, vacate
from lorakit.adapters.state import load_in_place
from lorakit.adapters.targets import base_modules
from lorakit.errors import SpecError
from lorakit.methods.base import TrainableReport
from lorakit.methods.beside import refuse_beside
from lorakit.methods.files import passport_document, write_method
from lorakit.methods.in_place import InPlace, each_once
from lorakit.methods.spec import Spec, spec_to_dict
from lorakit.weights.nf4 import is_planned_four_bit
from lorakit.weights.storage import num_params


@dataclass(frozen=True, slots=True)
class Choice:
    """What a method trains.

    Attributes:
        names: parameters of the base.
        sites: what the user is told.
        notes: one sentence each.
        left_out: modules whose values are not the base's.
        added: parameters that the method puts there: name -> numbers in it.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    added: Mapping[str, int] | None = None


class ChosenParameters(ABC):
    """A method that trains some of the base's own parameters and nothing else.

    Args:
        spec: the method's options.
        keep: keep the base's values, for `disabled`.
    """

    name = ""
    # What the method learns in float32 where the base is narrower: the last part of a name.
    float32_names: frozenset[str] = frozenset()

    def __init__(self, spec: Spec, *, keep: bool = True) -> None:
        self._options = spec_to_dict(spec)
        self.in_place = InPlace(keep=keep)
        self._base: dict[str, Any] = {}

    @abstractmethod
    def choose(self, model: nn.Module) -> Choice:
        """What is trained of this model; pure."""

    def options(self) -> dict[str, Any]:
        """The spec's fields."""
        return dict(self._options)

    def plan(self, model: nn.Module) -> TrainableReport:
        """Count what `choose` found.

        Raises:
            SpecError: a weight to train is in 4 bits.
            StateError: something is on the model already.
        """
        return self._report(model, self._choose(model))

    def attach(self, model: nn.Module) -> TrainableReport:
        """Freeze all but the chosen parameters."""
        choice = self._choose(model)
        report = self._report(model, choice)
        self._base = base_facts(model, choice.left_out)
        self.in_place.start(model, choice.names)
        occupy(model, self.name)
        return report

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The chosen parameters under their own names."""
        return dict(self.in_place.state())

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the parameters, in place and bit for bit."""
        load_in_place(self.state(model), state)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": list(self.state(model).values()), "lr": lr}]

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base's values inside the block."""
        with self.in_place.disabled():
            yield

    def merge(self, model: nn.Module) -> None:
        """The values are in the base's weights already: only the base's own are forgotten."""
        self.in_place.release()
        vacate(model)

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write lorakit.json and method.safetensors."""
        write_method(path, self.document(model, passport), self.state(model))

    def document(self, model: nn.Module, passport: Mapping[str, Any]) -> dict[str, Any]:
        """The content of lorakit.json."""
        num_params = sum(value.numel() for value in self.state(model).values())
        facts = {**passport, "base": self._base}
        return passport_document(self.name, self.options(), num_params, facts)

    def _choose(self, model: nn.Module) -> Choice:
        refuse_beside(model, self.name)
        choice = self.choose(model)
        modules = base_modules(model)
        for name in choice.names:
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and is_planned_four_bit(modules[owner]):
                raise SpecError(
                    f"{self.name} trains the base's own weights: 4-bit numbers have no gradient",
                    where=name,
                    expected="an adapter beside the 4-bit base (lora), or a dense base",
                    found="a weight in 4 bits",
                    remedy="set method to lora, or load the base dense (model.quantize: null)",
                )
        return choice

    def _report(self, model: nn.Module, choice: Choice) -> TrainableReport:
        chosen = each_once(model, choice.names).values()
        added = sum((choice.added or {}).values())
        return TrainableReport(
            num_trainable=sum(p.numel() for p in chosen) + added,
            num_total=num_params(model) + added,
            sites=choice.sites,
            notes=choice.notes,
            kept_bytes=sum(p.nbytes for p in chosen) if self.in_place.keep else 0,
            in_base_dtype=any(
                name.rpartition(".")[2] not in self.float32_names for name in choice.names
            ),
        )
