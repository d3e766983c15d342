"""Activations that are recomputed in the backward pass instead of kept."""

from __future__ import annotations

import ctypes
import platform

import torch
from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep each block's input alone, and run the block again when its gradients are due.

    Mutates `model`.
    """
    # The newer name first: transformers drops the older one in version 6.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


# Parameter of glibc's mallopt: from this size on, freed memory goes back to the system at once.
_M_MMAP_THRESHOLD = -3
_RETURNED_BYTES = 1 << 17


def return_freed_memory(device: torch.device) -> bool:
    """Have freed tensors of a megabyte and more leave the process at once, on a CPU under glibc.

    By default the C library keeps them, and tensors of changing sizes leave holes that no other
    fits: a process that recomputes its activations then holds up to twice what its tensors need.
    Holds for the rest of the process, and costs time: fresh memory is cleared by the system.

    Returns:
        Whether it is so from now on.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES))
