"""Which output rows of a fused projection one part owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` blocks of `length` rows, the i-th starting at `start + i * step`.

    A contiguous part (GPT-2's q) is one block whose step is the whole output. A part interleaved
    per head (BLOOM's q) is one block per head. `count * step` is always the whole output, so that
    the output can be viewed as (..., count, step).
    """

    start: int
    length: int
    step: int
    count: int = 1

    @property
    def size(self) -> int:
        """Number of rows in the part."""
        return self.length * self.count

    @property
    def whole(self) -> int:
        """Number of rows in the fused projection."""
        return self.step * self.count

    def spread(self, part: Tensor) -> Tensor:
        """Lay the part out over the whole output, zero elsewhere.

        Args:
            part: (..., size).

        Returns:
            (..., whole), the part's dtype.
        """
        blocks = part.unflatten(-1, (self.count, self.length))
        padded = F.pad(blocks, (self.start, self.step - self.start - self.length))
        return padded.flatten(-2)

    def take(self, whole: Tensor) -> Tensor:
        """The part's own rows of a whole output: the inverse of `spread`.

        Args:
            whole: (..., whole).

        Returns:
            (..., size).
        """
        blocks = whole.unflatten(-1, (self.count, self.step))
        return blocks[..., self.start : self.start + self.length].flatten(-2)

    def overlaps(self, other: Rows) -> bool:
        """Whether the two parts of one projection share a row."""
        mine = {
            self.start + i * self.step + j for i in range(self.count) for j in range(self.length)
        }
        return any(
            other.start + i * other.step + j in mine
            for i in range(other.count)
            for j in range(other.length)
        )
