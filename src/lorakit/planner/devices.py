"""The GPUs people have, and whether a run fits on them."""

from __future__ import annotations

from dataclasses import dataclass

# A CUDA context with its libraries, before the first tensor.
CONTEXT_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class GpuKind:
    """A kind of GPU: its name and the memory its makers state, in bytes."""

    name: str
    memory_bytes: int


# As stated by the makers, read as powers of ten: the cautious reading.
GPU_KINDS = (
    GpuKind("T4 16 GB", 16_000_000_000),
    GpuKind("RTX 4090 24 GB", 24_000_000_000),
    GpuKind("RTX 5090 32 GB", 32_000_000_000),
    GpuKind("A100 40 GB", 40_000_000_000),
    GpuKind("L40S 48 GB", 48_000_000_000),
    GpuKind("A100 80 GB", 80_000_000_000),
    GpuKind("H100 80 GB", 80_000_000_000),
    GpuKind("H200 141 GB", 141_000_000_000),
    GpuKind("B200 180 GB", 180_000_000_000),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run would fill one kind of GPU.

    Attributes:
        gpu: the kind.
        used: the share of its memory that is taken, the CUDA context included; above 1 where it
            does not fit.
        count: how many of them would hold the run if everything could be split evenly.
    """

    gpu: GpuKind
    used: float
    count: int

    @property
    def fits(self) -> bool:
        """Whether one is enough."""
        return self.used <= 1


def fits(total_bytes: float) -> list[Fit]:
    """How a run of this size would fill every kind of GPU.

    Args:
        total_bytes: the run's memory, without CUDA's own.
    """
    return [
        Fit(
            gpu=gpu,
            used=(total_bytes + CONTEXT_BYTES) / gpu.memory_bytes,
            count=-(-int(total_bytes) // (gpu.memory_bytes - CONTEXT_BYTES)),
        )
        for gpu in GPU_KINDS
    ]
