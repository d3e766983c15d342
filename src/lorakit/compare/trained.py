"""Load what a cell learned, on the base it was learned on."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import load_adapter
from lorakit.methods.base import Method
from lorakit.methods.lora import LoraMethod
from lorakit.models.load import load_base_model
from lorakit.train.config import TrainConfig

ADAPTER = "default"


def load_cell_base(config: TrainConfig) -> PreTrainedModel:
    """The base of a run, loaded as the run loaded it."""
    model = load_base_model(config.model.ref, dtype=config.model.dtype)
    if config.model.attention is not None:
        model.set_attn_implementation(config.model.attention)
    return model.eval()


def load_trained(config: TrainConfig, weights: Path) -> tuple[PreTrainedModel, Method]:
    """The base with what the run saved in `weights` on it, and the method that put it there.

    Raises:
        AdapterFileError, BaseMismatchError: the files do not fit.
    """
    model = load_cell_base(config)
    adapter = load_adapter(model, weights, name=ADAPTER)
    spec: LoraSpec = adapter.spec
    return model.eval(), LoraMethod(spec, ADAPTER)
