"""Where special positions enter a model; nothing here changes it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.targets import base_modules
from lorakit.errors import TargetError
from lorakit.layers.prefix import Positions
from lorakit.models.blocks import Block, transformer_blocks
from lorakit.models.positions import first_position, num_positions, position_tables


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where the input of one block passes by.

    Attributes:
        name: of the module, in the model.
        module: the block, or what computes the first block's input.
        behind: it is the module's output; else the first argument of the module.
    """

    name: str
    module: nn.Module
    behind: bool = False


@dataclass(frozen=True, slots=True)
class PrefixSite:
    """What a prefix method needs to know about a model.

    Attributes:
        model: the whole model.
        backbone: the part from tokens to the last hidden state.
        embedding_name: name of the token embedding.
        embedding: its weight, (vocabulary, d).
        layers: the places of the blocks' inputs, first to last.
        width: d_model, the size of a block's input.
        causal: the model is a decoder.
        positions: how it counts positions.
        context: the longest row it takes, or None where it does not say.
    """

    model: PreTrainedModel
    backbone: PreTrainedModel
    embedding_name: str
    embedding: Tensor
    layers: tuple[LayerPlace, ...]
    width: int
    causal: bool
    positions: Positions
    context: int | None


def prefix_site(model: nn.Module) -> PrefixSite:
    """Look at a model; works on the meta device.

    Raises:
        TargetError: its architecture is not known.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            "special positions need a transformers model",
            where=type(model).__name__,
            expected="a transformers.PreTrainedModel",
        )
    blocks = transformer_blocks(model)
    backbone = model.base_model
    if type(blocks[0].module).__name__ == "OPTDecoderLayer":
        # OPTForCausalLM calls the decoder past the model around it.
        backbone = backbone.get_submodule("decoder")
    assert isinstance(backbone, PreTrainedModel)
    embedding = backbone.get_input_embeddings()
    names = {id(module): name for name, module in base_modules(model).items()}
    positions = _positions(backbone)
    return PrefixSite(
        model=model,
        backbone=backbone,
        embedding_name=names[id(embedding)],
        embedding=embedding.get_parameter("weight"),
        layers=_layers(backbone, blocks, names),
        width=blocks[0].width,
        causal=blocks[0].kind == "decoder",
        positions=positions,
        context=num_positions(model),
    )


def _layers(
    backbone: nn.Module, blocks: list[Block], names: dict[int, str]
) -> tuple[LayerPlace, ...]:
    places = [LayerPlace(block.name, block.module) for block in blocks]
    if type(blocks[0].module).__name__ == "DebertaV2Layer":
        # Its convolution reads the embeddings' output beside the first block.
        embeddings = backbone.get_submodule("embeddings")
        places[0] = LayerPlace(names[id(embeddings)], embeddings, behind=True)
    return tuple(places)


def _positions(backbone: PreTrainedModel) -> Positions:
    given = "position_ids" in inspect.signature(backbone.forward).parameters
    learned = bool(position_tables(backbone))
    limit = num_positions(backbone) if learned else None
    return Positions(given, first_position(backbone), limit)
