"""The base of a run, as it trains fastest."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lorakit.models.attention import GROUPED, use_attention
from lorakit.models.load import load_base_model
from lorakit.models.packing import can_pack
from lorakit.train.config import ModelSection


def load_to_pack(
    base: ModelSection, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """The base as it is; on a CPU with the attention that lets batches be packed.

    Args:
        base: which one, and with which attention if that is said.
        dtype: what its weights are kept in.
        device: where to; None for where a run computes.
    """
    model = load_base_model(base.ref, base.quantize, dtype=dtype, device=device)
    if base.attention is None and model.device.type == "cpu" and can_pack(model):
        use_attention(model, GROUPED)
    return model
