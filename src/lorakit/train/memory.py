"""A modest estimate of a run's memory, from the model's shapes alone and before it is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.environment import available_memory_bytes
from lorakit.errors import MemoryPlanError
from lorakit.formatting import format_bytes
from lorakit.methods.base import TrainableReport
from lorakit.models.load import model_class
from lorakit.models.quantizable import estimate_nf4_bytes

# Per trained parameter: its gradient and AdamW's two moments, in float32 ...
_OPTIMIZER_BYTES = 12
# ... and itself, where it is not one of the base's.
_ADDED_BYTES = 4
# Logits, their softmax and their gradient, in float32.
_LOGIT_BYTES = 12
# What a layer keeps for its backward pass, as a multiple of the outputs of its products: the
# products themselves, norms, rotary positions, gates, attention's own buffers. A rule of thumb.
_KEPT_PER_OUTPUT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """The largest batch of a run.

    Attributes:
        rows: rows in one forward pass.
        length: tokens in the longest row.
        labels: learned tokens in the batch at most.
    """

    rows: int
    length: int
    labels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for; activations and logits by a rule of thumb.

    Attributes:
        weights_bytes: the frozen base.
        trained_bytes: what the method adds to the base, its gradients and optimizer state, and
            what it keeps of the base.
        activations_bytes: what the backward pass of the largest batch needs.
        logits_bytes: the logits at the labels of that batch.
    """

    weights_bytes: int
    trained_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        terms = {
            "base": self.weights_bytes,
            "gradients, optimizer and what is added": self.trained_bytes,
            "activations": self.activations_bytes,
            "logits": self.logits_bytes,
        }
        listed = ", ".join(f"{name} {format_bytes(value)}" for name, value in terms.items())
        return f"about {format_bytes(self.total_bytes)} ({listed})"


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, without any memory for weights."""
    wanted = model_class(config)
    with torch.device("meta"):
        if issubclass(wanted, PreTrainedModel):
            return wanted(config)
        return wanted.from_config(config)


def estimate_memory(
    model: PreTrainedModel,
    plan: TrainableReport,
    batch: BatchShape,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    four_bit: bool = False,
) -> MemoryEstimate:
    """The estimate.

    Args:
        model: the base; on the meta device is enough.
        plan: what is trained.
        batch: the largest batch.
        dtype: of the base's weights, and taken for the activations.
        checkpointing: whether activations are recomputed layer by layer.
        four_bit: whether linear layers are kept in NF4.
    """
    num_weights = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    head = model.get_output_embeddings()
    outputs = [
        module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    hidden = next(model.get_input_embeddings().parameters()).shape[1]
    per_token = _KEPT_PER_OUTPUT * sum(outputs)
    if checkpointing:
        num_layers = max(1, int(model.config.num_hidden_layers))
        per_token = per_token // num_layers + num_layers * hidden
    vocabulary = head.weight.shape[0] if isinstance(head, nn.Linear) else 0
    return MemoryEstimate(
        weights_bytes=estimate_nf4_bytes(model, dtype)
        if four_bit
        else num_weights * dtype.itemsize,
        trained_bytes=plan.num_trainable * _OPTIMIZER_BYTES
        + (plan.num_total - num_weights) * _ADDED_BYTES
        + plan.kept_bytes,
        activations_bytes=batch.rows * batch.length * per_token * dtype.itemsize,
        logits_bytes=batch.labels * vocabulary * _LOGIT_BYTES,
    )


def free_memory_bytes(device: torch.device) -> int:
    """The memory (bytes) a run on this device can take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


def require_room(estimate: MemoryEstimate, free_bytes: int) -> None:
    """Refuse a run that cannot fit: base, adapter and optimizer alone exceed what is free.

    Raises:
        MemoryPlanError: they do.
    """
    least_bytes = estimate.weights_bytes + estimate.trained_bytes
    if least_bytes > free_bytes:
        raise MemoryPlanError(
            "the run does not fit in memory",
            where="model and method",
            expected=f"at least {format_bytes(least_bytes)}; {estimate}",
            found=f"{format_bytes(free_bytes)} free",
            remedy="set model.dtype to bfloat16 or model.quantize to nf4, or use a smaller model, "
            "rank or target, or a method that trains less",
        )
