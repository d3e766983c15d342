"""What every storage of a frozen weight can do."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BaseWeight(Protocol):
    """One weight of a base layer, however it is stored."""

    def read(self) -> Tensor:
        """The weight as a dense tensor in the layer's own layout; it must not be changed."""
        ...

    def write(self, weight: Tensor) -> None:
        """Store a dense weight of the same layout, rounded to what the storage can hold."""
        ...

    def keep(self) -> object:
        """Whatever `restore` needs to bring the present bits back."""
        ...

    def restore(self, kept: object) -> None:
        """Bring the bits back that were there when `keep` was called."""
        ...

    def kept_bytes(self) -> int:
        """What a kept original costs, in bytes."""
        ...
