"""Whether a comparison trains cells together, and which with which."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal

from lorakit.compare.beside import BESIDE, begun, can_share, groups, plan_beside
from lorakit.compare.cells import Cell
from lorakit.environment import default_device
from lorakit.errors import ConfigError, RequestError
from lorakit.train.config import TrainConfig
from lorakit.train.run import Say

# As in a sweep: beyond it a batch is large enough to keep a machine busy.
_MOST_TOGETHER = 8
_WHERE = "together"


class Sharing:
    """Which cells share a process and their batches.

    Args:
        wanted: the setting of the comparison. With auto cells share on a GPU, which a batch of one
            run leaves idle; on a CPU as many rows take as long in one batch as in several.
    """

    def __init__(self, wanted: Literal["auto", "yes", "no"]) -> None:
        self.wanted = wanted
        self.on = wanted == "yes" or (wanted == "auto" and default_device().type != "cpu")

    def check(self, cells: Sequence[Cell], finished: Container[str], say: Say) -> None:
        """Ask the model of the first cells that would share; with auto a refusal is told.

        Args:
            cells: all of the methods that are run.
            finished: names of those that are.
            say: takes the refusal.

        Raises:
            RequestError: with yes: nothing can be trained together, with the reason.
        """
        if not self.on:
            return
        left = [cell for cell in cells if cell.name not in finished]
        waiting = [cell for cell in cells if cell.config is None and can_share(_trial(cell))]
        if self.wanted == "yes" and left and not groups(cells) and len(waiting) < 2:
            raise ConfigError(
                "no two runs of this comparison can be trained together",
                where=_WHERE,
                expected="LoRA runs without dropout of one length, or for task classify of one "
                "seed too: several rates to search, several seeds, or several LoRA methods",
                remedy="set together: auto, or no",
            )
        for group in groups(left)[:1]:
            try:
                plan_beside([cell.config for cell in group[:2] if cell.config is not None])
            except RequestError as error:
                if self.wanted == "yes":
                    raise type(error)(
                        error.what,
                        where=f"{_WHERE}; {error.where}" if error.where else _WHERE,
                        expected=error.expected,
                        found=error.found,
                        remedy="set together: auto, or no",
                    ) from error
                self.on = False
                say(f"every run is trained alone: {error.what}")

    def group_of(self, cell: Cell, runnable: Sequence[Cell]) -> list[Cell]:
        """The cell, and those that are trained with it.

        A cell that was begun alone goes on alone.

        Args:
            cell: the next one.
            runnable: all whose config is known and that are not finished.
        """
        if not self.on or _began_alone(cell):
            return [cell]
        mine = [group for group in groups(runnable) if cell in group]
        if not mine:
            return [cell]
        return [other for other in mine[0] if not _began_alone(other)][:_MOST_TOGETHER]


def _trial(cell: Cell) -> TrainConfig:
    """A run of the cell's method, whatever its rate and length."""
    rate = cell.arm.rates[0]
    return cell.arm.train_config(lr=rate, seed=cell.seed, length={"max_steps": 1})


def _began_alone(cell: Cell) -> bool:
    config = cell.config
    return config is not None and begun(config) and not (Path(config.output) / BESIDE).is_file()
