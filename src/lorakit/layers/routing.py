"""Which adapter runs: one for the whole batch, none, or one per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.errors import StateError

Selection = str | None | tuple[str | None, ...]


@dataclass
class Routing:
    """The selection shared by all adapted layers of one model.

    `active` is an adapter's name, None for the base, or one of those per batch row.
    """

    active: Selection = None
    merged: list[str] = field(default_factory=list[str])

    def select(self, selection: Selection) -> None:
        """Change the selection in place.

        Raises:
            StateError: a merged adapter cannot be taken out of the batch.
        """
        for name in self.merged:
            if (set(selection) if isinstance(selection, tuple) else {selection}) != {name}:
                raise StateError(
                    f"adapter {name!r} is merged into the weights, so it runs for every row",
                    expected=f"use(model, {name!r})",
                    found=f"use(model, {selection!r})",
                    remedy="call unmerge(model) first",
                )
        self.active = selection


def row_groups(rows: Sequence[str | None], batch: int, where: str) -> dict[str, Tensor]:
    """The batch indices that each named adapter owns.

    A batch may hold several consecutive entries per row (beams, returned sequences, a flattened
    sequence axis); row i then owns the i-th block.

    Args:
        rows: one adapter name or None per row.
        batch: the size of the tensor's first axis.
        where: the site, for the error.

    Returns:
        name -> int64 indices into the first axis, ascending.

    Raises:
        StateError: the batch is not a multiple of the number of rows.
    """
    if batch % len(rows):
        raise StateError(
            "the batch does not have one adapter per row",
            where=where,
            expected=f"a first axis that is a multiple of {len(rows)}",
            found=str(batch),
            remedy="name one adapter (or None) per row of the batch",
        )
    block = batch // len(rows)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        if name is not None:
            groups.setdefault(name, []).extend(range(i * block, (i + 1) * block))
    return {name: torch.tensor(indices) for name, indices in groups.items()}
