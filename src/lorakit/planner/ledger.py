"""Counts what a computation keeps alive and how many operations it does, tensor by tensor."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Formula = Callable[..., int]
# Bytes alive at one moment, by the phase they were made in.
Peak = Mapping[str, float]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    _gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    # The scores once more, then the gradients of the weights, of v, of q and of k.
    return sdpa_flop_count(query.shape, key.shape, value.shape) * 5 // 2


# torch's table knows the kernels of CUDA; these two are the CPU's.
_FLOPS: dict[Any, Formula] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Ledger(TorchDispatchMode):
    """Inside the block every storage that an operation makes is counted until it is freed.

    What a kernel allocates and frees inside itself is not seen. Works on fake tensors, which have
    sizes and no memory: then it says what the real computation would hold.

    Attributes:
        phase: the name under which new storages are counted; see `enter`.
        alive: bytes alive now, by the phase they were made in.
        peaks: stretch -> the same at its fullest moment.
        flops: floating-point operations of the matrix products and attention kernels, by phase.

    Args:
        known: tensors that are there before and not to be counted (weights, inputs).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.phase = ""
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.flops: Counter[str] = Counter()
        self._stretch = ""
        self._total = 0
        self._fullest: dict[str, int] = {}
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._phase_of: dict[int, str] = {}
        for tensor in known:
            self._count(tensor, counted=False)

    def enter(self, phase: str, stretch: str) -> None:
        """Begin a phase, and a stretch whose fullest moment is kept."""
        self.phase, self._stretch = phase, stretch
        self._look()

    def move(self, tensor: Tensor, phase: str) -> None:
        """Count a tensor under another phase from now on (a gradient, once it is known as one)."""
        key = id(tensor.untyped_storage())
        before = self._phase_of.get(key)
        if before is not None:
            size = tensor.untyped_storage().nbytes()
            self.alive[before] -= size
            self.alive[phase] += size
            self._phase_of[key] = phase

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor | tuple | list):
            return out  # asked of a tensor: its device, for one, four times in ten
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.phase] += int(formula(*args, **kwargs, out_val=out))
        return out

    def _count(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = cast(torch.UntypedStorage, tensor.untyped_storage())
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes() if counted else 0
        self._seen[key] = weakref.ref(storage, partial(self._freed, key, size))
        self._phase_of[key] = self.phase
        self.alive[self.phase] += size
        self._total += size
        self._look()

    def _look(self) -> None:
        if self._total > self._fullest.get(self._stretch, -1):
            self._fullest[self._stretch] = self._total
            self.peaks[self._stretch] = dict(self.alive)

    def _freed(self, key: int, size: int, _ref: object) -> None:
        self._seen.pop(key, None)
        self.alive[self._phase_of.pop(key)] -= size
        self._total -= size
