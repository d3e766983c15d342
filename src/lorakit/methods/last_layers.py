"""The last layers only: the paper's FT-Top2, and a linear head alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.plan import modules_beside
from lorakit.adapters.targets import base_modules
from lorakit.errors import SpecError
from lorakit.methods.chosen import Choice, ChosenParameters
from lorakit.methods.in_place import base_parameters, parameters_beside, require_own
from lorakit.methods.spec import ALSO_TRAIN, require_choice, require_names, require_whole
from lorakit.models.blocks import transformer_blocks

Head = Literal["none", "also", "only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LastLayersSpec:
    """Train the last blocks and nothing else of the base.

    Raises:
        SpecError: a value that cannot be.
    """

    num_layers: int = field(default=2, metadata={"help": "transformer blocks from the end"})
    head: Head = field(
        default="none",
        metadata={
            "help": "what stands behind the body (lm_head, classifier): none leaves it frozen, "
            "also trains it beside the blocks, only trains it and no block"
        },
    )
    also_train: tuple[str, ...] = field(default=(), metadata=ALSO_TRAIN)

    def __post_init__(self) -> None:
        require_whole("num_layers", self.num_layers, least=1)
        require_choice("head", self.head, ("none", "also", "only"))
        require_names("also_train", self.also_train)


class LastLayersMethod(ChosenParameters):
    """FT-Top2 (Li and Liang 2021, as Hu et al. 2021 compare with it): the last blocks are tuned.

    A block is its attention, its MLP and their norms; the norm behind the last block, the
    embeddings and the head stay frozen. For GPT-2 medium two blocks are 25,192,448 parameters.

    Args:
        spec: its options.
    """

    name = "last_layers"

    def __init__(self, spec: LastLayersSpec) -> None:
        super().__init__(spec)
        self.spec = spec

    def choose(self, model: nn.Module) -> Choice:
        """The parameters of the last blocks, of the head, and of the modules beside.

        Raises:
            TargetError: the architecture's blocks are not known, a name matches nothing, or a
                weight is shared with something frozen.
            SpecError: more blocks than there are, or no head.
        """
        names: list[str] = []
        sites: list[str] = []
        heads: list[str] = []
        if self.spec.head != "only":
            sites = self._blocks(model)
        if self.spec.head != "none":
            heads = head_modules(model)
        parameters = base_parameters(model)
        for site in [*sites, *heads]:
            names += [name for name in parameters if name.startswith(f"{site}.")]
        require_own(model, names)
        beside = modules_beside(self.spec.also_train, base_modules(model))
        names += [n for n in parameters_beside(model, self.spec.also_train) if n not in names]
        new = [site.module for site in beside if site.module not in heads]
        return Choice(
            names=tuple(names),
            sites=(*sites, *heads, *new),
            left_out=tuple(site.module for site in beside),
        )

    def _blocks(self, model: nn.Module) -> list[str]:
        blocks = [block.name for block in transformer_blocks(model)]
        if self.spec.num_layers > len(blocks):
            raise SpecError(
                "the model has fewer blocks than are to be trained",
                where="num_layers",
                expected=f"at most {len(blocks)}",
                found=str(self.spec.num_layers),
                remedy="lower num_layers, or take the method full",
            )
        return blocks[-self.spec.num_layers :]


def head_modules(model: nn.Module) -> list[str]:
    """The modules with parameters that stand behind the model's body; changes nothing.

    Raises:
        SpecError: there is none: the model is a bare body, or not one of transformers.
    """
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        found = [
            name
            for name, child in model.named_children()
            if child is not model.base_model and any(True for _ in child.parameters())
        ]
        if found:
            return found
    raise SpecError(
        "the model has no head to train",
        where="head",
        expected="a module behind the body, such as lm_head or classifier",
        found=type(model).__name__,
        remedy="head: none",
    )
