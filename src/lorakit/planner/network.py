"""What several processes cost beside their computing: bytes over the network, and their time.

A calculation, not a measurement. A network is one number here: the bits that a process can send,
and receive, in a second while all others do the same. Latency, switches that are shared and
machines whose processes talk faster inside than outside are not in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.errors import RequestError
from lorakit.planner.depth import repeated_blocks
from lorakit.weights.nf4 import BITS_PER_PARAM, INDEX_BITS, is_planned_four_bit

_BITS = 8
# The block that is computed, and the next one on its way.
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkCost:
    """What crosses the network in one optimizer step, for each process.

    Attributes:
        processes: how many there are.
        sharded: whether the base is split over them.
        gradient_bytes: sent for the sum of the gradients of what is learned.
        base_bytes: received of a split base.
        gradient_s: time of the sum; it waits for the last backward pass.
        base_s: time of the base's parts; they can cross while others are computed.
        compute_s: time of computing alone, None where no rate is known.
    """

    processes: int
    sharded: bool
    gradient_bytes: int
    base_bytes: int
    gradient_s: float
    base_s: float
    compute_s: float | None

    @property
    def fastest_step_s(self) -> float | None:
        """A step whose base crosses behind the computing as far as there is any."""
        if self.compute_s is None:
            return None
        return max(self.compute_s, self.base_s) + self.gradient_s

    @property
    def slowest_step_s(self) -> float | None:
        """A step in which nothing happens at the same time."""
        if self.compute_s is None:
            return None
        return self.compute_s + self.base_s + self.gradient_s

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "fastest_step_s": self.fastest_step_s,
            "slowest_step_s": self.slowest_step_s,
        }


def estimate_network(
    *,
    processes: int,
    bandwidth_gbps: float,
    learned_bytes: int,
    base_bytes: int = 0,
    passes: int = 1,
    compute_s: float | None = None,
) -> NetworkCost:
    """The network's part of a step.

    Gradients G are summed in a ring, 2 (P - 1)/P G per process (Patarasuk and Yuan 2009, Bandwidth
    optimal all-reduce algorithms); a split base W comes together for every forward and every
    backward pass, (P - 1)/P W each.

    Args:
        processes: P.
        bandwidth_gbps: 10^9 bits in a second that each process sends, and receives.
        learned_bytes: G.
        base_bytes: W where the base is split, else 0.
        passes: forward passes in a step (gradient accumulation).
        compute_s: the time of a step's computing, if it is known.

    Raises:
        RequestError: a number that cannot be.
    """
    for name, value in (
        ("processes", processes),
        ("bandwidth_gbps", bandwidth_gbps),
        ("passes", passes),
    ):
        if value <= 0:
            raise RequestError(
                f"{name} must be positive", where=name, expected="> 0", found=f"{value:g}"
            )
    bytes_per_s = bandwidth_gbps * 1e9 / _BITS
    share = (processes - 1) / processes
    gradient_bytes = round(2 * share * learned_bytes)
    gathered_bytes = round(2 * passes * share * base_bytes)
    return NetworkCost(
        processes=processes,
        sharded=base_bytes > 0,
        gradient_bytes=gradient_bytes,
        base_bytes=gathered_bytes,
        gradient_s=gradient_bytes / bytes_per_s,
        base_s=gathered_bytes / bytes_per_s,
        compute_s=compute_s,
    )


def shard_bytes(model: PreTrainedModel, dtype: torch.dtype, processes: int) -> int:
    """What a process holds of a base that is split, at the fullest moment, in bytes.

    Its own share; two blocks whole, the one that is computed and the next; and what is outside of
    blocks (embeddings, head), which stays whole during a step. Where no blocks are found, all of it
    is whole. Scales of 4-bit weights are not split.

    Args:
        model: the base on the meta device; layers that will be in 4 bits are marked.
        dtype: of what is dense.
        processes: how many split it.
    """
    total = _stored_bytes(model, dtype)
    if processes == 1:
        return round(total.split + total.whole)
    blocks = repeated_blocks(model)
    at_once = total.split
    if blocks is not None:
        found = model.get_submodule(blocks.name).children()
        sizes = sorted(_stored_bytes(block, dtype).split for block in found)
        at_once = total.split - sum(sizes) + sum(sizes[-_BLOCKS_AT_ONCE:])
    return round(total.split / processes + at_once + total.whole)


class _Stored(NamedTuple):
    """Bytes of weights: those that can be split, and those that each process keeps."""

    split: float
    whole: float


def _stored_bytes(module: nn.Module, dtype: torch.dtype) -> _Stored:
    packed = {
        id(layer.get_parameter("weight"))
        for layer in module.modules()
        if is_planned_four_bit(layer)
    }
    numbers = {True: 0, False: 0}
    for parameter in module.parameters():
        numbers[id(parameter) in packed] += parameter.numel()
    scales = numbers[True] * (BITS_PER_PARAM - INDEX_BITS) / 8
    return _Stored(numbers[True] * INDEX_BITS / 8 + numbers[False] * dtype.itemsize, scales)
