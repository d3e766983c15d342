"""The transformer blocks of a model, and where each of their halves enters the residual stream.

Methods that add something per block (bottleneck adapters, prefixes in every layer, the last layers
alone) find their places here. Every architecture is written down, never guessed: a block that only
looks like another one may add its residual elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.targets import base_modules
from lorakit.errors import TargetError

BlockKind = Literal["decoder", "encoder"]


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block.

    Attributes:
        name: the block's name in the model, as if nothing were attached.
        module: the block itself; not a wrapper that stands in its place.
        attention_output: full name of the module whose output enters the residual after attention.
        mlp_output: the same after the MLP.
        kind: "decoder" where attention is causal, else "encoder".
        width: d_model, the size of the residual stream.
        norms: full names of the layer norms over the residual stream in this block.
        output_norm: where the residual is normalised after the MLP's output was added to it (a
            post-norm block, such as BERT's), the full name of that norm; else None.
        parallel: whether attention and MLP read the same residual and are added to it together.
    """

    name: str
    module: nn.Module
    attention_output: str
    mlp_output: str
    kind: BlockKind
    width: int
    norms: tuple[str, ...]
    output_norm: str | None = None
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    attention: str
    mlp: str
    encoder: bool = False
    post_norm: str | None = None


_LLAMA = _Layout("self_attn.o_proj", "mlp.down_proj")
# A norm of its own stands between each half and the residual.
_SANDWICH = _Layout("post_attention_layernorm", "post_feedforward_layernorm")
_BERT = _Layout("attention.output.dense", "output.dense", True, "output.LayerNorm")

_LAYOUTS: Mapping[str, _Layout] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Phi3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _SANDWICH,
    "Gemma3DecoderLayer": _SANDWICH,
    "GPT2Block": _Layout("attn.c_proj", "mlp.c_proj"),
    "GPTNeoXLayer": _Layout("attention.dense", "mlp.dense_4h_to_h"),
    "OPTDecoderLayer": _Layout("self_attn.out_proj", "fc2", post_norm="final_layer_norm"),
    "FalconDecoderLayer": _Layout("self_attention.dense", "mlp.dense_4h_to_h"),
    "BloomBlock": _Layout("self_attention.dense", "mlp.dense_4h_to_h"),
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "ElectraLayer": _BERT,
    "DebertaV2Layer": _BERT,
}

ARCHITECTURES = (
    "Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3, GPT-2, GPT-NeoX, OPT, Falcon, BLOOM, BERT, "
    "RoBERTa, XLM-RoBERTa, ELECTRA, DeBERTa-v2"
)


def transformer_blocks(model: nn.Module) -> list[Block]:
    """The model's blocks, first to last; changes nothing and works on the meta device.

    Args:
        model: a transformers model, with or without adapters attached.

    Raises:
        TargetError: the architecture is not known, or has a third half (cross-attention) for which
            the methods of this package are not defined.
    """
    modules = base_modules(model)
    _refuse_encoder_decoder(model)
    found = [
        _block(name, module, modules)
        for name, module in modules.items()
        if type(module).__name__ in _LAYOUTS
    ]
    if not found:
        raise TargetError(
            "the blocks of this architecture are not known: where its attention and its MLP enter "
            "the residual would be a guess",
            where=type(model).__name__,
            expected=ARCHITECTURES,
            found=_repeated(modules),
            remedy="take a method that names its layers itself, such as lora",
        )
    return found


def _block(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Block:
    layout = _LAYOUTS[type(module).__name__]
    places = {"attention": f"{name}.{layout.attention}", "MLP": f"{name}.{layout.mlp}"}
    for half, place in places.items():
        if place not in modules:
            raise TargetError(
                f"the block has no {half} output where {type(module).__name__} has it",
                where=name,
                expected=place,
                remedy="take the model's own class from transformers",
            )
    _refuse_what_is_bypassed(name, module)
    width = _width(modules[places["MLP"]])
    return Block(
        name=name,
        module=module,
        attention_output=places["attention"],
        mlp_output=places["MLP"],
        kind="encoder" if layout.encoder and not _attribute(module, "is_decoder") else "decoder",
        width=width,
        norms=tuple(
            n for n, m in modules.items() if n.startswith(name + ".") and _is_norm(m, width)
        ),
        output_norm=_output_norm(name, module, layout),
        parallel=_is_parallel(module),
    )


def _output_norm(name: str, module: nn.Module, layout: _Layout) -> str | None:
    # OPT has both kinds: its 350M model normalises after adding, the others before.
    if layout.post_norm is None or _attribute(module, "do_layer_norm_before"):
        return None
    return f"{name}.{layout.post_norm}"


def _is_parallel(module: nn.Module) -> bool:
    config = _attribute(module, "config")
    if type(module).__name__ == "FalconDecoderLayer":
        return bool(config.parallel_attn or config.new_decoder_architecture)
    return bool(_attribute(module, "use_parallel_residual"))


def _width(module: nn.Module) -> int:
    """The output size; a quantized layer's weight has another shape, so it is not asked."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    return module.get_parameter("weight").numel()


def _is_norm(module: nn.Module, width: int) -> bool:
    if not type(module).__name__.endswith("Norm"):
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    # Norms over one head (Qwen3's q_norm) have the head's size and see no residual.
    return weight is not None and weight.numel() == width


def _attribute(module: nn.Module, name: str) -> Any:
    return vars(module).get(name)


def _refuse_what_is_bypassed(name: str, module: nn.Module) -> None:
    if "crossattention" in dict(module.named_children()):
        raise TargetError(
            "the block has a cross-attention between its attention and its MLP, for which the "
            "methods that work per block are not defined",
            where=name,
            remedy="take a method that names its layers itself, such as lora",
        )
    for part in module.modules():
        slices = _attribute(part, "pretraining_tp")
        if _attribute(part, "slow_but_exact") and isinstance(slices, int) and slices > 1:
            raise TargetError(
                "the block computes its output projection in slices and never calls the layer",
                where=name,
                found=f"pretraining_tp={slices}, slow_but_exact=True",
                remedy="set slow_but_exact=False in the model's configuration",
            )


def _refuse_encoder_decoder(model: nn.Module) -> None:
    config = _attribute(model, "config")
    if config is not None and getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            "an encoder-decoder model has two stacks and a cross-attention, for which the methods "
            "that work per block are not defined",
            where=type(model).__name__,
            expected=ARCHITECTURES,
            remedy="take a method that names its layers itself, such as lora",
        )


def _repeated(modules: Mapping[str, nn.Module]) -> str | None:
    """The classes that stand in numbered lists: what the blocks are, most likely."""
    numbered = [type(m).__name__ for n, m in modules.items() if n.rpartition(".")[2].isdigit()]
    return ", ".join(dict.fromkeys(numbered)) or None
