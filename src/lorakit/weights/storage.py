"""From a module to its frozen weight, however it is stored."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakit.weights.base import BaseWeight
from lorakit.weights.dense import DenseWeight, is_dense
from lorakit.weights.nf4 import FourBitWeight, four_bit_refusal, is_four_bit


def base_weight(module: nn.Module, name: str = "weight") -> BaseWeight:
    """One weight of a base layer behind the protocol that its storage needs."""
    if name == "weight" and is_four_bit(module):
        return FourBitWeight(module)
    return DenseWeight(module, name)


def storage_refusal(module: nn.Module) -> str | None:
    """Why the module's weight cannot be read and written here, or None."""
    if is_four_bit(module):
        return four_bit_refusal(module)
    return None if is_dense(module) else "its weight is not an ordinary floating-point parameter"


def storage_of(modules: Iterable[nn.Module]) -> str:
    """How these modules' weights are stored as a whole: "dense", or "nf4" where any of them is."""
    for module in modules:
        if is_four_bit(module) and not module.get_parameter("weight").is_meta:
            return FourBitWeight(module).storage()
    return "dense"


def num_params(model: nn.Module) -> int:
    """The model's numbers, each parameter once, 4-bit weights by their original shape."""
    found: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            size = parameter.numel()
            if name == "weight" and is_four_bit(module) and isinstance(module, nn.Linear):
                size = module.in_features * module.out_features
            found[id(parameter)] = size
    return sum(found.values())
