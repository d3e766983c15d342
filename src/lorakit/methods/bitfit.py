"""BitFit: the bias vectors alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.plan import modules_beside
from lorakit.adapters.saving import save_learned_only
from lorakit.adapters.targets import base_modules
from lorakit.errors import MergeError, SpecError
from lorakit.layers.float32_bias import Float32Bias
from lorakit.methods.base import TrainableReport
from lorakit.methods.chosen import Choice, ChosenParameters
from lorakit.methods.in_place import base_parameters, parameters_beside, require_own
from lorakit.methods.spec import ALSO_TRAIN, require_choice, require_names
from lorakit.weights.nf4 import FourBitWeight, is_four_bit

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitFitSpec:
    """Train every bias vector.

    Raises:
        SpecError: a value that cannot be.
    """

    add: bool = field(
        default=False,
        metadata={
            "help": "give every linear layer without a bias one that starts at zero (models such "
            "as Llama have none); the result cannot be merged"
        },
    )
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        require_choice("add", self.add, (True, False))
        require_names("also_train", self.also_train)


class BitFitMethod(ChosenParameters):
    """BitFit (Zaken et al. 2021): y = W0 x + b with b trained, W0 frozen.

    The biases are learned in float32 whatever the base's dtype, and rounded to it by `merge`.

    Args:
        spec: its options.
    """

    name = "bitfit"
    float32_names = frozenset({"bias"})

    def __init__(self, spec: BitFitSpec) -> None:
        super().__init__(spec)
        self.spec = spec
        self._added: dict[str, tuple[nn.Linear, nn.Parameter]] = {}
        self._wide: list[Float32Bias] = []

    def choose(self, model: nn.Module) -> Choice:
        """All parameters that are called bias, in linear layers and in norms.

        Raises:
            SpecError: there is none.
            TargetError: a name in also_train matches nothing, or shares its weight.
        """
        names = [n for n in base_parameters(model) if n.rpartition(".")[2] == "bias"]
        without = linear_layers_without_bias(model) if self.spec.add else {}
        if not names and not without:
            raise SpecError(
                "this model has no bias vectors, so BitFit would train nothing",
                where="add",
                expected="a model with biases, such as GPT-2 or BERT",
                found=type(model).__name__,
                remedy="add: true gives every linear layer a bias that starts at zero; or take "
                "another method",
            )
        require_own(model, names)
        beside = modules_beside(self.spec.also_train, base_modules(model))
        names += [n for n in parameters_beside(model, self.spec.also_train) if n not in names]
        note = (
            f"zero bias vectors are added to {len(without)} linear layers: the base has none "
            "there, so this is not BitFit as it was published, and it cannot be merged"
        )
        return Choice(
            names=tuple(names),
            sites=(*names, *(f"{name}.bias" for name in without)),
            notes=(note,) if without else (),
            left_out=tuple(site.module for site in beside),
            added={f"{name}.bias": layer.out_features for name, layer in without.items()},
        )

    def attach(self, model: nn.Module) -> TrainableReport:
        """Freeze all but the biases; add the missing ones where that was asked for."""
        without = linear_layers_without_bias(model) if self.spec.add else {}
        report = super().attach(model)
        for name, layer in without.items():
            zeros = torch.zeros(
                layer.out_features, dtype=_computed_in(layer), device=layer.weight.device
            )
            layer.bias = nn.Parameter(zeros)
            self._added[f"{name}.bias"] = (layer, layer.bias)
        self._widen(model)
        if self._added:
            save_learned_only(model, self)
        return report

    def _widen(self, model: nn.Module) -> None:
        """Learn every narrow bias in float32; a module trained beside stays as it is."""
        learned = {id(bias) for name, bias in self.state(model).items() if name.endswith("bias")}
        owners = {
            id(bias): module
            for module in base_modules(model).values()
            if (bias := module._parameters.get("bias")) is not None and id(bias) in learned
        }
        for module in owners.values():
            if _computed_in(module) in _NARROW:
                self._wide.append(Float32Bias(module, _computed_in(module)))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The biases under their own names."""
        added = {name: bias for name, (_, bias) in self._added.items()}
        return {**self.in_place.state(), **added}

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base's biases inside the block; where it has none, none."""
        with ExitStack() as stack:
            stack.enter_context(super().disabled(model))
            for layer, bias in self._added.values():
                layer.bias = None  # pyright: ignore[reportAttributeAccessIssue]
                stack.callback(setattr, layer, "bias", bias)
            yield

    def merge(self, model: nn.Module) -> None:
        """The biases are in the model already.

        Raises:
            MergeError: the base's class has no place for the biases that were added.
        """
        if self._added:
            raise MergeError(
                "the added bias vectors cannot be merged: the base's configuration has no place "
                "for them, so a reload would drop them",
                where="bitfit, add: true",
                found=f"{len(self._added)} bias vectors that {type(model).__name__} does not have",
                remedy="keep the base and the method's directory beside each other",
            )
        for bias in self._wide:
            bias.end()
        super().merge(model)


def _computed_in(module: nn.Module) -> torch.dtype:
    """The dtype of the products that the bias is added to."""
    if is_four_bit(module) and not module.get_parameter("weight").is_meta:
        return FourBitWeight(module).dtype()
    owned = dict(module.named_parameters(recurse=False))
    return owned["weight" if "weight" in owned else "bias"].dtype


def linear_layers_without_bias(model: nn.Module) -> dict[str, nn.Linear]:
    """The body's linear layers that have no bias, by name; the output head is left out."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in base_modules(model).items()
        if isinstance(module, nn.Linear)
        and "bias" not in dict(module.named_parameters(recurse=False))
        and module is not head
    }
