"""Memory in large pages, for work that allocates and frees a lot of it."""

from __future__ import annotations

import os
import sys

# torch reads it once, at its first allocation.
_VARIABLE = "THP_MEM_ALLOC_ENABLE"


def use_huge_pages() -> None:
    """Ask torch to take tensors from 2 MiB pages, where Linux gives them on request.

    A step of training on a CPU allocates its activations anew, and each 4 KiB page of them costs a
    fault. Mutates the environment of this process, and counts only before torch's first
    allocation; a value that the user has set stays.
    """
    if sys.platform == "linux":
        os.environ.setdefault(_VARIABLE, "1")
