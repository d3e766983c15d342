"""A value computed from tensors, kept until one of them changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_State = tuple[weakref.ref[Tensor], int, int, torch.dtype, torch.device]


class NormCache:
    """One tensor that was computed from others, and how those looked then.

    A source counts as changed when it is another object, was written in place (autograd's version
    counter), or has other memory, dtype or device. Writing through `tensor.data` moves no counter
    and is not seen; an optimizer that does so works in train mode, where nothing is cached.
    """

    def __init__(self) -> None:
        self._sources: list[_State] = []
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The kept value, or `compute()` if there is none or a source changed.

        Args:
            sources: the tensors that `compute` reads; tensors made under inference mode count no
                versions, so nothing is kept for them.
            compute: makes the value.
        """
        if any(t.is_inference() for t in sources):
            return compute()
        if self._value is None or not self._holds(sources):
            self._value = compute()
            self._sources = [_state(t) for t in sources]
        return self._value

    def clear(self) -> None:
        """Forget the value."""
        self._sources, self._value = [], None

    def _holds(self, sources: Sequence[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            known[0]() is t and known[1:] == _state(t)[1:]
            for known, t in zip(self._sources, sources, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> NormCache:
        """A copy starts empty: it belongs to copies of the tensors."""
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        """Pickled empty, for the same reason."""
        return NormCache, ()


def _state(tensor: Tensor) -> _State:
    return (
        weakref.ref(tensor),
        tensor._version,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
    )
