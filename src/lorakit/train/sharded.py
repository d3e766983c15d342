"""A frozen base in shards over the processes (FSDP2); what is learned stays whole in each.

Only the base is large. Its parameters are split block by block with torch's `fully_shard` and come
together for the moment in which a block is computed. What is learned is small: every process keeps
all of it, and its gradients are summed as without shards. So an adapter is whole wherever it is
saved, and its optimizer's state is one file that any number of processes can go on from.

What is asked for comes from accelerate's own settings (`accelerate config`, `accelerate launch
--use_fsdp --fsdp_version 2`), which reach a process as environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from lorakit.adapters.attachments import attachments_of
from lorakit.adapters.fingerprint import fingerprint
from lorakit.errors import ConfigError
from lorakit.models.blocks import transformer_blocks
from lorakit.processes import Processes
from lorakit.train.config import TrainConfig
from lorakit.weights.nf4 import FourBitWeight, QuantizedLinear, is_four_bit

_ASKED = "ACCELERATE_USE_FSDP"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the base is split.

    Attributes:
        reshard_after_forward: a block's parameters are given up behind its forward pass and come
            together again for its backward pass; False keeps them.
        offload: shards wait in the host's memory.
    """

    reshard_after_forward: bool = True
    offload: bool = False


def sharding_asked(processes: Processes) -> Sharding | None:
    """What accelerate's settings say, or None; takes them out of the environment.

    They are taken out because transformers and accelerate would act on them too, and shard what is
    learned.

    Raises:
        ConfigError: FSDP of the first version.
    """
    if not is_set(_ASKED):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            "FSDP of the first version flattens parameters, and adapters would not be their own",
            where="accelerate's setting fsdp_version (FSDP_VERSION)",
            expected="2",
            found=version,
            remedy="accelerate launch --use_fsdp --fsdp_version 2 ...",
        )
    del os.environ[_ASKED]
    if processes.alone:
        return None
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "1")
    return Sharding(reshard_after_forward=reshard, offload=is_set("FSDP_OFFLOAD_PARAMS"))


def require_sharding(config: TrainConfig) -> None:
    """Refuse what a sharded base does not go together with.

    Raises:
        ConfigError: with the key that stands against it.
    """
    reasons = (
        (
            config.method != "lora",
            "method",
            "only what LoRA learns is kept whole beside a split base",
        ),
        (
            config.lora.update != "lora",
            "lora.update",
            "DoRA reads whole weights of the base when it is saved",
        ),
        (
            config.lora.init not in ("gaussian", "kaiming") or config.lora.ranks != "uniform",
            "lora.init and lora.ranks",
            "a start taken from data or weights is computed on the whole base",
        ),
        (
            config.preference.cache_reference,
            "preference.cache_reference",
            "processes come to the end of their rows at different times",
        ),
    )
    for is_set, key, why in reasons:
        if is_set:
            raise ConfigError(
                f"this does not go together with a base in shards (FSDP2): {why}",
                where=key,
                expected="a plain LoRA adapter",
                remedy="change it, or start without FSDP: torchrun -m lorakit train",
            )


def in_turn(processes: Processes, work: Callable[[], None]) -> None:
    """Work that the processes of a machine do one after the other.

    So a machine holds one whole base at a time, and not as many as it has processes.

    Raises:
        LorakitError, FailedElsewhereError: see `Processes.everywhere`.
    """
    local = int(os.environ.get("LOCAL_RANK", processes.rank))
    for turn in range(max(processes.gather(processes.num_here))):
        processes.everywhere(work if turn == local else _nothing)


def _nothing() -> None:
    """It is another process's turn."""


def shard_base(
    model: PreTrainedModel, mesh: DeviceMesh, sharding: Sharding, device: torch.device
) -> None:
    """Split the frozen parameters over the processes; mutates the model.

    Args:
        model: on the CPU, with the method attached.
        mesh: of the processes that split it.
        sharding: how.
        device: where this process computes.
    """
    # Its values will be spread over the processes.
    attachments_of(model).base_fingerprint = fingerprint(model).to_json()
    learned = [p for p in model.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if is_four_bit(module):
            _leave_scales(module, device)
    # On a CPU they are in the host's memory already.
    offload = sharding.offload and device.type != "cpu"
    policy: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in [block.module for block in transformer_blocks(model)]:
        _shard(block, learned, mesh, policy, sharding.reshard_after_forward)
    _shard(model, learned, mesh, policy, False)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, buffer.to(device), name not in module._non_persistent_buffers_set
            )


def _leave_scales(layer: nn.Module, device: torch.device) -> None:
    """Make the packed indices of a Linear4bit a parameter like any other; mutates `layer`.

    Its scales (1/32 of the indices' size) stay with the layer, on `device`, where bitsandbytes
    looks for them when a parameter that was split comes together.
    """
    parameter, state = FourBitWeight(layer).keep()
    packed = parameter.detach().as_subclass(Tensor)
    layer.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    cast(Any, state).to(device)
    cast(QuantizedLinear, layer).quant_state = state


def _shard(
    module: nn.Module,
    learned: list[nn.Parameter],
    mesh: DeviceMesh,
    policy: OffloadPolicy,
    reshard: bool,
) -> None:
    fully_shard(
        module,
        mesh=mesh,
        offload_policy=policy,
        reshard_after_forward=reshard,
        ignored_params=set(learned),
    )


def is_set(name: str) -> bool:
    """Whether an environment variable of accelerate says yes."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
