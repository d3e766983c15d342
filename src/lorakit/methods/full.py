"""Full fine-tuning: every parameter of the base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.plan import modules_beside
from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError, LorakitWarning, ModelError, SpecError, StateError
from lorakit.files import atomic_directory, write_json
from lorakit.formats.passport import PASSPORT_NAME
from lorakit.methods.chosen import Choice, ChosenParameters
from lorakit.methods.in_place import base_parameters, each_once
from lorakit.methods.spec import require_choice, require_names
from lorakit.models.checkpoint import copy_companions
from lorakit.models.load import load_base_model
from lorakit.models.quiet import quiet_transformers
from lorakit.models.resolve import resolve_model
from lorakit.weights.nf4 import is_planned_four_bit


@dataclass(frozen=True, kw_only=True, slots=True)
class FullSpec:
    """Train all parameters; tied weights are one.

    Raises:
        SpecError: a value that cannot be.
    """

    keep_base: bool = field(
        default=False,
        metadata={
            "help": "keep the base's weights in memory beside, so that the method can be switched "
            "off in the same process"
        },
    )
    also_train: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "modules that are new and start at random (a head): trained like all others, "
            "but not part of the base's identity"
        },
    )

    def __post_init__(self) -> None:
        require_choice("keep_base", self.keep_base, (True, False))
        require_names("also_train", self.also_train)


class FullMethod(ChosenParameters):
    """Full fine-tuning: W = W0 + dW with dW as large as W0 (Hu et al. 2021, section 2).

    Args:
        spec: its options.
    """

    name = "full"

    def __init__(self, spec: FullSpec) -> None:
        super().__init__(spec, keep=spec.keep_base)
        self.spec = spec

    def choose(self, model: nn.Module) -> Choice:
        """Every parameter.

        Raises:
            SpecError: the base is quantized.
            TargetError: a name in also_train matches nothing.
        """
        found = base_parameters(model)
        modules = base_modules(model)
        for name, parameter in found.items():
            in_four_bits = is_planned_four_bit(modules[name.rpartition(".")[0]])
            if not parameter.is_floating_point() and not in_four_bits:
                raise SpecError(
                    "full fine-tuning needs dense weights: a quantized one has no gradient",
                    where=name,
                    expected="a floating-point weight",
                    found=str(parameter.dtype).removeprefix("torch."),
                    remedy="load the base dense (model.quantize: null), or train lora on it",
                )
        beside = modules_beside(self.spec.also_train, modules)
        return Choice(
            names=tuple(found),
            sites=tuple(each_once(model, found)),
            left_out=tuple(site.module for site in beside),
        )

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write a plain Hugging Face model directory with lorakit.json in it.

        Raises:
            StateError: the model is not one of transformers.
            OutputError: the disk refuses.
        """
        if not isinstance(model, PreTrainedModel):
            raise StateError(
                "full fine-tuning saves models of transformers",
                where=type(model).__name__,
                remedy="save its state_dict yourself",
            )
        document = self.document(model, passport)
        with atomic_directory(path, replace=True) as staging:
            _copy_tokenizer(model, staging)
            with quiet_transformers():
                model.save_pretrained(staging)
            write_json(staging / PASSPORT_NAME, document)


def read_full_state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The parameters of a saved model, in the dtype and under the names of this one.

    Raises:
        AdapterFileError: the directory does not hold a model that can be read.
    """
    dtype = next(model.parameters()).dtype
    try:
        saved = load_base_model(path, dtype=dtype, device="cpu")
    except ModelError as error:
        raise AdapterFileError(
            f"the fine-tuned model cannot be read: {error.what}",
            where=error.where or str(path),
            expected=error.expected,
            found=error.found,
            remedy="copy the directory again, or train again",
        ) from error
    return dict(each_once(saved, base_parameters(saved)))


def _copy_tokenizer(model: PreTrainedModel, staging: Path) -> None:
    ref = str(model.config.name_or_path or "")
    if not ref:
        return
    try:
        copy_companions(resolve_model(ref, files="small").path, staging)
    except ModelError as error:
        warnings.warn(
            f"the model is saved without its tokenizer: {error.what}", LorakitWarning, stacklevel=4
        )
