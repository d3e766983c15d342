"""What a comparison has before it, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lorakit.compare.cells import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCell:
    """One cell of a plan.

    Attributes:
        name: arm and cell.
        kind: probe, search or final.
        steps: optimizer steps, where the config counts them.
        seconds: how long it took; None if it is not finished.
        estimate_s: how long it may take: the mean of the finished cells of its method and kind,
            else of its kind; None if there are none, or if it is finished.
    """

    name: str
    kind: str
    steps: int | None
    seconds: float | None
    estimate_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """All cells in their order, and the sum of the estimates."""

    cells: tuple[PlannedCell, ...]

    @property
    def num_finished(self) -> int:
        """Cells that have a record."""
        return sum(cell.seconds is not None for cell in self.cells)

    @property
    def remaining_s(self) -> float | None:
        """The time of the others (seconds); None where one of them cannot be estimated."""
        left = [cell.estimate_s for cell in self.cells if cell.seconds is None]
        known = [seconds for seconds in left if seconds is not None]
        return sum(known) if len(known) == len(left) else None


def forecast(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> Forecast:
    """The plan with its estimate; pure."""
    done = [(cell, records[cell.name]["seconds"]) for cell in cells if cell.name in records]

    def guess(cell: Cell) -> float | None:
        alike = [s for other, s in done if other.kind == cell.kind]
        same_arm = [s for other, s in done if other.kind == cell.kind and other.arm == cell.arm]
        return mean(same_arm or alike) if alike else None

    planned: list[PlannedCell] = []
    for cell in cells:
        record = records.get(cell.name)
        planned.append(
            PlannedCell(
                name=cell.name,
                kind=cell.kind,
                steps=None if cell.config is None else cell.config.train.max_steps,
                seconds=None if record is None else record["seconds"],
                estimate_s=guess(cell) if record is None else None,
            )
        )
    return Forecast(cells=tuple(planned))
