"""Load what a cell learned, on the base it was learned on."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.methods.saved import load_saved
from lorakit.models.attention import use_attention
from lorakit.models.load import load_base_model
from lorakit.train.config import TrainConfig

_ADAPTER = "default"


def load_cell_base(config: TrainConfig) -> PreTrainedModel:
    """The base of a run, loaded as the run loaded it."""
    base = config.model
    model = load_base_model(base.ref, base.quantize, dtype=base.dtype)
    if base.attention is not None:
        use_attention(model, base.attention)
    return model.eval()


def load_trained(config: TrainConfig, weights: Path) -> tuple[PreTrainedModel, Method]:
    """The base with what the run saved in `weights` on it, and the method that put it there.

    Raises:
        AdapterFileError, BaseMismatchError: the files do not fit.
    """
    model = load_cell_base(config)
    method = load_saved(model, weights, _ADAPTER)
    return model.eval(), method


def adapter_of(method: Method) -> str | None:
    """What `use` and `evaluate` call the method: its adapter, or None."""
    return method.adapter_name if isinstance(method, LoraMethod) else None
