"""An arm's directory: what it has reached, read back so that a sweep can go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError
from lorakit.files import read_back, write_json
from lorakit.sweep.arms import Arm
from lorakit.train.checkpoints import Checkpoint, CheckpointStore
from lorakit.train.course import METRICS, RECORD
from lorakit.train.merit import Merit, merit
from lorakit.train.metrics import Line, MetricsLog
from lorakit.train.resume import CHECKPOINTS, find_start
from lorakit.train.schema import changed_keys

FAILED = "failed.json"
# Where a sweep lies may change.
_PLACES = frozenset({"output"})


class ArmFiles:
    """What an arm left on the disk so far.

    Args:
        arm: the arm.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.directory = Path(arm.config.output)

    def record(self) -> dict[str, Any] | None:
        """run.json of an arm that is finished, or None.

        Raises:
            ConfigError: it is damaged, or of another config.
        """
        return self._read(RECORD)

    def failure(self) -> str | None:
        """Why the arm failed, or None.

        Raises:
            ConfigError: the file is damaged, or of another config.
        """
        found = self._read(FAILED)
        return None if found is None else str(found.get("why"))

    def fail(self, why: str) -> None:
        """Note that the arm cannot go on."""
        write_json(self.directory / FAILED, {"why": why, "config": self.arm.config.to_dict()})

    def start(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None.

        Raises:
            ConfigError: it was written under another config.
            OutputError: all checkpoints are damaged.
        """
        store = CheckpointStore(self.directory / CHECKPOINTS, keep=1)
        if not store.steps():
            return None
        found = find_start(self.arm.config, resume=True)
        if found is not None:
            self._require_same(found.identity["config"], found.path)
        return found

    def reached(self) -> int:
        """The steps that need not be done again."""
        if self.record() is not None:
            return max((line["step"] for line in self.lines()), default=0)
        start = self.start()
        return 0 if start is None else start.step

    def lines(self) -> list[Line]:
        """Training and validation lines so far."""
        return MetricsLog(self.directory / METRICS).read()

    def merit_at(self, step: int, by: str) -> Merit | None:
        """How good the arm is after a step; None where it did not come so far."""
        found = (n for n in self.lines() if n["step"] == step and "eval_loss" in n)
        return merit(next(found, {}), by)

    def remove_checkpoints(self) -> None:
        """Free the disk of a finished arm: adapter and record are written."""
        shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.directory / name
        if not file.is_file():
            return None
        remedy = f"remove {self.directory}; the arm is then run again"
        record = read_back(file, "config", of="an arm", remedy=remedy)
        self._require_same(record["config"], file)
        return record

    def _require_same(self, before: dict[str, Any], where: Path) -> None:
        changed = [
            key for key in changed_keys(before, self.arm.config.to_dict()) if key not in _PLACES
        ]
        if changed:
            raise ConfigError(
                "an arm was run with another config",
                where=str(where),
                expected="the values in its config.yaml",
                found="changed: " + ", ".join(changed[:8]),
                remedy="put them back, choose another output, or remove "
                f"{self.directory} to run it again",
            )
