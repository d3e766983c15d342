"""Activations that are recomputed in the backward pass instead of kept."""

from __future__ import annotations

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
