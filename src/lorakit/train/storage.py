"""Whether what a config asks of the base's storage and of the optimizer can be had here."""

from __future__ import annotations

import torch

from lorakit.errors import ConfigError
from lorakit.train.config import TrainConfig
from lorakit.weights.nf4 import bitsandbytes, require_nf4


def require_storage(config: TrainConfig, device: torch.device) -> None:
    """Refuse what this machine does not have: 4 bits, a paged optimizer.

    Args:
        config: the run.
        device: where it computes.

    Raises:
        ConfigError: a paged optimizer without CUDA.
        ModelError: bitsandbytes is missing, or does not work on this device.
    """
    if config.model.quantize is not None:
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
