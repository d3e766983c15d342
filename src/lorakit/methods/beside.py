"""What may stand on one model together: several LoRA adapters, and nothing else."""

from __future__ import annotations

from torch import nn

from lorakit.adapters.attachments import find_attachments
from lorakit.adapters.occupied import refuse_occupied
from lorakit.errors import StateError


def refuse_beside(model: nn.Module, newcomer: str) -> None:
    """Refuse a method other than LoRA on a model that carries anything; changes nothing.

    Args:
        model: what the newcomer would be put on.
        newcomer: its name.

    Raises:
        StateError: a method or LoRA adapters are on the model.
    """
    refuse_occupied(model, newcomer)
    record = find_attachments(model)
    if record is not None:
        raise StateError(
            f"{newcomer} cannot be attached beside LoRA adapters: it would freeze them, and learn "
            "on a base that they change",
            where=type(model).__name__,
            found=f"the LoRA adapters {', '.join(record.plans)}",
            remedy="detach(model) first, or load the base model afresh",
        )
