"""Whether what a config asks of the base's storage and of the optimizer can be had here."""

from __future__ import annotations

import torch

from lorakit.errors import ConfigError, SpecError
from lorakit.train.config import TrainConfig
from lorakit.weights.nf4 import bitsandbytes, require_nf4

# These write the very weights that would be in 4 bits.
_TRAINS_WEIGHTS = ("full", "last_layers")


def require_storage(config: TrainConfig, device: torch.device) -> None:
    """Refuse 4 bits under a method that trains the weights, and what this machine does not have.

    Args:
        config: the run.
        device: where it computes.

    Raises:
        SpecError: the method trains weights that would be in 4 bits.
        ConfigError: a paged optimizer without CUDA.
        ModelError: bitsandbytes is missing, or does not work on this device.
    """
    if config.model.quantize is not None:
        method: str = config.method
        if method in _TRAINS_WEIGHTS:
            raise SpecError(
                f"{method} trains the base's own weights: 4-bit numbers have no gradient",
                where="model.quantize and method",
                expected="an adapter beside the 4-bit base (lora), or a dense base",
                found=f"{config.model.quantize} with {method}",
                remedy="set method to lora, or model.quantize to null",
            )
        require_nf4(device)
    if config.train.optimizer == "paged_adamw":
        if device.type != "cuda":
            raise ConfigError(
                "a paged optimizer keeps its state in CUDA's unified memory",
                where="train.optimizer",
                expected="a CUDA device",
                found=f"paged_adamw on {device.type}, where there is nothing to page out to",
                remedy="set train.optimizer to adamw",
            )
        bitsandbytes()
