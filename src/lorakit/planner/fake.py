"""A model of the right shapes without memory, on the device that a run would use."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.layers.rms_norm import use_fast_norms
from lorakit.models.quantizable import quantizable

# What an operator without a fake raises stands in a note of the plan; torch logs its traceback too.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def keep_in(model: PreTrainedModel, dtype: torch.dtype, *, four_bit: bool) -> list[nn.Linear]:
    """Give a model on the meta device the storage of a loaded base; mutates it.

    Args:
        model: on the meta device, nothing attached.
        dtype: of the floating parameters.
        four_bit: whether its linear layers are kept in NF4, see `models.nf4.quantizable`.

    Returns:
        The layers that are kept in NF4.
    """
    layers = quantizable(model) if four_bit else {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    packed = {name: _PackedLinear(module) for name, module in layers.items()}
    for name, module in packed.items():
        model.set_submodule(name, module)
    return list(packed.values())


def make_ready(model: PreTrainedModel) -> None:
    """Install the norms that a CPU run installs; mutates a model on the meta device."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # What recognises a norm probes it: for that moment it has values.
            for name, parameter in module.named_parameters(recurse=False):
                value = torch.ones(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    use_fast_norms(model)


def become_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer by one without memory; mutates the model.

    They seem to be on the CPU: a torch built without CUDA cannot even pretend to index there.

    Args:
        model: a method attached or not; shared parameters stay shared.
        mode: whose tensors they become.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tables = cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers))
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _fake(tensor, mode)
                table[name] = made[id(tensor)]


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


class _PackedLinear(nn.Linear):
    """What a 4-bit layer does with memory: each product unpacks the whole weight for a moment."""

    def __init__(self, dense: nn.Module) -> None:
        weight = dense.get_parameter("weight")
        shape = weight.T.shape if isinstance(dense, Conv1D) else weight.shape
        bias = dict(dense.named_parameters(recurse=False)).get("bias")
        super().__init__(shape[1], shape[0], bias=bias is not None, device="meta")
        self.to(weight.dtype)
        self.weight.requires_grad_(weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """W x + b, nothing of W or x kept."""
        return _UnpackedProduct.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ torch.empty_like(weight, dtype=grads[0].dtype), None, None
