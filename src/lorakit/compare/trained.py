"""Load what a cell learned, on the base it was learned on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorakit.environment import default_device
from lorakit.methods.base import Method
from lorakit.methods.files import read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.methods.saved import load_saved
from lorakit.models.attention import use_attention
from lorakit.models.load import load_tokenizer, resolve_dtype
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import Objective
from lorakit.train.objectives.registry import build_objective
from lorakit.train.prepare import read_rows

_ADAPTER = "default"


def objective_of(config: TrainConfig) -> Objective:
    """What a run learned, made of its rows as the run made it."""
    return build_objective(config, load_tokenizer(config.model.ref), read_rows(config)[0])


def load_cell_base(
    config: TrainConfig, weights: Path, objective: Objective | None = None
) -> PreTrainedModel:
    """The base of a run, loaded as the run loaded it; for task classify with the head's start.

    Args:
        config: the run.
        weights: what it saved.
        objective: of the run, where it is at hand.
    """
    base = config.model
    # What the run decided: full fine-tuning keeps float32 where LoRA's base is bfloat16.
    stated = read_saved(weights).passport.get("base_dtype")
    dtype = resolve_dtype(base.dtype or stated, default_device()) or torch.float32
    model = (objective or objective_of(config)).load_model(dtype)
    if base.attention is not None:
        use_attention(model, base.attention)
    return model.eval()


def load_trained(
    config: TrainConfig, weights: Path, objective: Objective | None = None
) -> tuple[PreTrainedModel, Method]:
    """The base with what the run saved in `weights` on it, and the method that put it there.

    Raises:
        AdapterFileError, BaseMismatchError: the files do not fit.
    """
    model = load_cell_base(config, weights, objective)
    method = load_saved(model, weights, _ADAPTER)
    return model.eval(), method


def adapter_of(method: Method) -> str | None:
    """What `use` and `evaluate` call the method: its adapter, or None."""
    return method.adapter_name if isinstance(method, LoraMethod) else None
