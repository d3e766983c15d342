"""Whether weights fit in the memory that is free, asked before they are read."""

from __future__ import annotations

import torch

from lorakit.environment import available_memory_bytes
from lorakit.errors import MemoryPlanError


def require_memory(name: str, need_bytes: int, device: torch.device) -> None:
    """Refuse weights that do not fit.

    Args:
        name: the model's.
        need_bytes: of the weights alone.
        device: where they will be.

    Raises:
        MemoryPlanError: less is free.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = available_memory_bytes()
    if need_bytes > free_bytes:
        raise MemoryPlanError(
            "the model does not fit in memory",
            where=f"{name} on {device}",
            expected=f"{need_bytes / 1e9:.1f} GB for the weights alone",
            found=f"{free_bytes / 1e9:.1f} GB free",
            remedy="use a smaller dtype, 4-bit weights (nf4), a smaller model, or a machine with "
            "more memory",
        )
