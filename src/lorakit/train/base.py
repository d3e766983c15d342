"""The base of a run, loaded, and what is noted of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lorakit.adapters.fingerprint import fingerprint
from lorakit.environment import memory_bytes
from lorakit.models.attention import use_attention
from lorakit.models.nf4 import Quantization, quantization_of
from lorakit.train.config import TrainConfig
from lorakit.train.prepare import Preparation


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A base with nothing attached.

    Attributes:
        model: the base.
        sha256: its fingerprint.
        quantization: how its linear layers are kept, None where they are dense.
        process_bytes: memory of the process before it was loaded.
        loaded_bytes: and after.
    """

    model: PreTrainedModel
    sha256: str
    quantization: Quantization | None
    process_bytes: int
    loaded_bytes: int


def load_base(
    config: TrainConfig, prepared: Preparation, device: torch.device | None = None
) -> LoadedBase:
    """Load what the config names, with the attention it asks for.

    Args:
        config: the run.
        prepared: the same, prepared.
        device: where to; None for where the run computes.

    Raises:
        ModelError: it cannot be loaded.
    """
    process_bytes = memory_bytes()
    model = prepared.objective.load_model(prepared.dtype, device)
    quantization = quantization_of(model)
    if config.model.attention is not None:
        use_attention(model, config.model.attention)
    return LoadedBase(
        model=model,
        sha256=fingerprint(model).sha256,
        quantization=quantization,
        process_bytes=process_bytes,
        loaded_bytes=memory_bytes(),
    )
