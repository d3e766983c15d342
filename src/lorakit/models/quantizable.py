"""Which layers of a model are in 4 bits, decided without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lorakit.errors import ModelError
from lorakit.models.adaptable import cannot_adapt
from lorakit.weights.nf4 import BITS_PER_PARAM, is_planned_four_bit, plan_four_bit
from lorakit.weights.storage import num_params

# Subclasses of nn.Linear that write the same product, x W^T + b, in another way. transformers puts
# 4-bit layers in place of nn.Linear itself only, so it cannot read these back (see `products_of`).
_PRODUCTS = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def quantizable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers that are quantized on load, by name; works on the meta device.

    Left dense: the output head (and what is tied to it), task heads outside the pretrained body,
    embeddings, norms, convolutions, experts stacked in one tensor, and layers that their
    architecture keeps in float32.
    """
    head = model.get_output_embeddings()
    body = model.base_model_prefix
    has_body = bool(body) and hasattr(model, body)
    shared = _shared_weights(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D) or _is_product(type(module)))
        and module is not head
        and id(module.get_parameter("weight")) not in shared
        and (not has_body or name.startswith(body + "."))
        and not kept_wide(model, name, None)
    }


def products_of(model: nn.Module) -> list[str]:
    """Layers that can be quantized and that transformers could not read back in 4 bits."""
    return [
        name
        for name, module in model.named_modules()
        if _is_product(vars(module).get("source_cls", type(module)))
    ]


def mark_four_bit(model: PreTrainedModel, quantize: str | None) -> None:
    """Mark what will be in 4 bits once the model is loaded, so that plans know of it.

    Methods refuse to train a marked weight, and `holds_four_bit` sees it.

    Args:
        model: without weights, dense; mutated.
        quantize: as for `load_model`. Where it is None, a checkpoint that bitsandbytes wrote in
            4 bits is still loaded as it is.
    """
    skipped: list[str] | None = []
    if quantize is None:
        stored = _stored_facts(model.config)
        if not stored.get("load_in_4bit"):
            return
        skipped = stored.get("llm_int8_skip_modules")
    for name, module in quantizable(model).items():
        if should_convert_module(name, skipped):
            plan_four_bit(module)


def holds_four_bit(model: nn.Module) -> bool:
    """Whether any weight is in 4 bits, or is marked to be."""
    return any(is_planned_four_bit(module) for module in model.modules())


def estimate_nf4_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """The bytes of the model's weights once its linear layers are in NF4; no weights needed.

    Args:
        model: on the meta device is enough.
        dtype: of what stays dense.
    """
    num_quantized = sum(m.get_parameter("weight").numel() for m in quantizable(model).values())
    num_dense = num_params(model) - num_quantized
    return round(num_quantized * BITS_PER_PARAM / 8) + num_dense * dtype.itemsize


def is_stored_four_bit(
    config: PretrainedConfig, directory: Path, quantize: str | None = None
) -> bool:
    """Whether a checkpoint already holds bitsandbytes' 4-bit weights.

    Args:
        config: its configuration.
        directory: where it lies, for messages.
        quantize: what was asked for: "nf4", or None for what is stored.

    Raises:
        ModelError: it is quantized in another way.
    """
    facts = _stored_facts(config)
    if not facts:
        return False
    method = str(facts.get("quant_method", ""))
    if method == "bitsandbytes" and facts.get("load_in_4bit"):
        kind = str(facts.get("bnb_4bit_quant_type", "fp4"))
        if quantize not in (None, kind):
            raise ModelError(
                f"the checkpoint is stored in {kind} and cannot become {quantize}",
                where=f"{directory / 'config.json'}, key bnb_4bit_quant_type",
                expected=quantize,
                found=kind,
                remedy="load it as it is (quantize=None), or take the dense checkpoint",
            )
        return True
    raise cannot_adapt(facts, directory)


def _stored_facts(config: PretrainedConfig) -> dict[str, Any]:
    """What config.json says of a quantization; empty where there is none."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    return stored if isinstance(stored, dict) else stored.to_dict()


def _is_product(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__name__}" in _PRODUCTS


def _shared_weights(model: nn.Module) -> set[int]:
    """Parameters that several modules hold."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}


def kept_wide(model: PreTrainedModel, name: str, dtype: torch.dtype | None) -> bool:
    """Whether the architecture asks for float32 here (T5's wo), in place of this or any dtype."""
    names = set(model._keep_in_fp32_modules_strict or ())
    if dtype != torch.bfloat16:
        # This list is about the narrow range of float16 alone.
        names |= set(model._keep_in_fp32_modules or ())
    return dtype != torch.float32 and any(part in names for part in name.split("."))
