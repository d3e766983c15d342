"""The cells of a comparison: one training run each, planned from what is already finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import ge
from pathlib import Path
from typing import Any, Literal

from lorakit.compare.arms import Arm
from lorakit.compare.config import DEFAULT_SHARE, CompareConfig
from lorakit.compare.files import DataFiles
from lorakit.errors import ConfigError
from lorakit.files import read_back
from lorakit.train.config import TrainConfig
from lorakit.train.merit import Merit, merit
from lorakit.train.schema import changed_keys

Kind = Literal["probe", "search", "final"]
RECORD = "cell.json"
# A cell's identity without the places where files lie: they may move, their content may not.
_PLACES = ("output",)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run.

    Attributes:
        arm: its method.
        kind: probe (how fast are steps), search (one learning rate), final (one seed).
        lr: the learning rate; None while the choice of it is not finished.
        seed: of the run.
        config: the run; None while the rate or the length is not known.
        measures: the final score and the latency that are asked for, as plain values.
        data_sha256: of the rows.
    """

    arm: Arm
    kind: Kind
    lr: float | None
    seed: int
    config: TrainConfig | None
    measures: Mapping[str, Any]
    data_sha256: Mapping[str, str]

    @property
    def name(self) -> str:
        """Arm and cell, as messages and directories have it."""
        return _name(self.arm, self.kind, self.lr, self.seed)

    def identity(self) -> dict[str, Any]:
        """What decides the cell's numbers, as plain values."""
        values = {} if self.config is None else self.config.to_dict()
        values = {key: value for key, value in values.items() if key not in _PLACES}
        if "data" in values:
            values["data"] = {
                key: value
                for key, value in values["data"].items()
                if key not in ("train", "validation")
            }
        return {"train": values, "measures": self.measures, "data": dict(self.data_sha256)}

    @property
    def sha256(self) -> str:
        """Hash of the identity."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


Records = Mapping[str, Mapping[str, Any]]


def plan_cells(config: CompareConfig, data: DataFiles, records: Records) -> list[Cell]:
    """All cells in the order in which they run; pure.

    Probes and searches come first, then the final runs seed by seed, so that an unfinished
    comparison compares all methods on the seeds it has.

    Args:
        config: the comparison.
        data: its rows.
        records: the finished cells' records by the cell's name.
    """
    planners = [_ArmPlanner(config, data, records, arm) for arm in config.arms]
    going = [planner for planner in planners if not planner.gave_up()]
    cells = [cell for planner in planners for cell in planner.early()]
    cells += [cell for planner in going for cell in planner.first_seed()]
    return cells + [planner.seed(seed) for seed in config.seeds[1:] for planner in going]


def directory_of(config: CompareConfig, cell: Cell) -> Path:
    """Where a cell's run lies."""
    return _directory(config, cell.name)


def _directory(config: CompareConfig, name: str) -> Path:
    return Path(config.output) / "cells" / name


def _name(arm: Arm, kind: Kind, lr: float | None, seed: int) -> str:
    rate = "lr-unknown" if lr is None else f"lr-{lr:g}"
    leaf = {"probe": "probe", "search": rate, "final": f"{rate}-seed-{seed}"}[kind]
    return f"{arm.slug}/{leaf}"


def read_record(directory: Path, cell: Cell) -> dict[str, Any] | None:
    """A finished cell's record; None where the cell is not finished.

    Raises:
        ConfigError: the cell was finished under another config, or its record is damaged.
    """
    file = directory / RECORD
    if not file.is_file():
        return None
    remedy = f"remove {directory}; the cell is then run again"
    record = read_back(file, "identity", "sha256", of="a cell", remedy=remedy)
    if record["sha256"] != cell.sha256:
        changed = changed_keys(record["identity"], cell.identity())
        raise ConfigError(
            "a finished cell was run with another config",
            where=str(directory),
            expected="the values in its cell.json",
            found="changed: " + ", ".join(changed[:8] or ["the version of the record"]),
            remedy=f"put them back, choose another output, or remove {directory} to run it again",
        )
    return record


def chosen_rates(config: CompareConfig, data: DataFiles, records: Records) -> dict[str, float]:
    """The learning rate of every method for which it is settled, by the method's name."""
    found = ((arm, _ArmPlanner(config, data, records, arm).rate()) for arm in config.arms)
    return {arm.name: rate for arm, rate in found if rate is not None}


def _best_first(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, Merit]]:
    """The rates of runs that were validated, the best first; of equal ones the lower rate."""
    found = [(record["lr"], _merit(record)) for record in records]
    judged = [(rate, merit) for rate, merit in found if merit is not None]
    return sorted(judged, key=lambda run: (run[1], -run[0]), reverse=True)


def _merit(record: Mapping[str, Any]) -> Merit | None:
    return None if record["failed"] else merit(record["final"], record["by"])


def _holds(whole: Merit | None, search: Merit | None) -> bool:
    """Whether a whole run is not worse than its search run in what decides and in its loss."""
    return whole is not None and (search is None or any(map(ge, whole, search)))


class _ArmPlanner:
    """The cells of one method."""

    def __init__(self, config: CompareConfig, data: DataFiles, records: Records, arm: Arm) -> None:
        self.config = config
        self.data = data
        self.records = records
        self.arm = arm

    def early(self) -> list[Cell]:
        """Probe and search runs."""
        cells: list[Cell] = []
        if self.config.budget.seconds is not None:
            cells.append(self._probe())
        if len(self.arm.rates) > 1 and not self._probe_failed():
            cells += self._search()
        return cells

    def gave_up(self) -> bool:
        """Whether every learning rate failed, so that there is none to run the seeds with."""
        cells = self.early()
        finished = all(cell.name in self.records for cell in cells)
        known = self._candidates() and self._length(1.0) is not None
        return bool(cells) and finished and not known

    def first_seed(self) -> list[Cell]:
        """The first seed's runs: the search's best rate, then the next best while none holds.

        A rate may learn fast and then diverge, and the shorter search run cannot see that.
        """
        candidates = self._candidates()
        if not candidates:
            return [self._final(None, self.config.seeds[0], first=True)]
        cells: list[Cell] = []
        for rate, searched in candidates:
            cells.append(self._final(rate, self.config.seeds[0], first=True))
            record = self.records.get(cells[-1].name)
            if record is None or _holds(_merit(record), searched):
                break
        return cells

    def seed(self, seed: int) -> Cell:
        """The run of a further seed, with the rate that the first seed settled."""
        return self._final(self.rate(), seed, first=False)

    def rate(self) -> float | None:
        """The learning rate of the method; None while it is not settled."""
        if len(self.arm.rates) == 1:
            return self.arm.rates[0]
        cells = self.first_seed()
        found = [self.records[cell.name] for cell in cells if cell.name in self.records]
        if len(found) < len(cells):
            return None
        return next((rate for rate, _ in _best_first(found)), cells[0].lr)

    def _candidates(self) -> Sequence[tuple[float, Merit | None]]:
        """Rates with what the search found of them, best first; empty while it is not finished."""
        if len(self.arm.rates) == 1:
            return [(self.arm.rates[0], None)]
        cells = self._search()
        found = [self.records[cell.name] for cell in cells if cell.name in self.records]
        if len(found) < len(cells):
            return []
        return _best_first(found)

    def _final(self, rate: float | None, seed: int, *, first: bool) -> Cell:
        """A run of the whole length; latency is measured on the first seed only."""
        measures: dict[str, Any] = {"eval": self._eval()}
        latency = self.config.latency
        if first and latency.trials:
            measures["latency"] = asdict(latency)
        return self._cell("final", rate, seed, self._length(1.0), measures)

    def _probe(self) -> Cell:
        steps = {"max_steps": self.config.budget.probe_steps}
        return self._cell("probe", self.arm.rates[0], self.config.lr_search.seed, steps, {})

    def _search(self) -> list[Cell]:
        search = self.config.lr_search
        if search.steps is not None:
            length: dict[str, Any] | None = {"max_steps": search.steps}
        else:
            length = self._length(search.share or DEFAULT_SHARE)
        return [self._cell("search", rate, search.seed, length, {}) for rate in self.arm.rates]

    def _probe_failed(self) -> bool:
        if self.config.budget.seconds is None:
            return False
        return bool(self.records.get(self._probe().name, {}).get("failed"))

    def _length(self, share: float) -> dict[str, Any] | None:
        budget = self.config.budget
        if budget.steps is not None:
            return {"max_steps": max(1, round(share * budget.steps))}
        if budget.epochs is not None:
            return {"epochs": share * budget.epochs}
        probe = self.records.get(self._probe().name)
        if probe is None or probe.get("seconds_per_step") is None or budget.seconds is None:
            return None
        return {"max_steps": max(1, math.floor(share * budget.seconds / probe["seconds_per_step"]))}

    def _eval(self) -> dict[str, Any]:
        options = asdict(self.config.eval)
        del options["data"]
        return {**options, "metrics": list(options["metrics"])}

    def _cell(
        self,
        kind: Kind,
        lr: float | None,
        seed: int,
        length: Mapping[str, Any] | None,
        measures: Mapping[str, Any],
    ) -> Cell:
        config = None
        if lr is not None and length is not None:
            output = _directory(self.config, _name(self.arm, kind, lr, seed))
            config = self.arm.train_config(
                lr=lr, seed=seed, length=length, data=self.data.section(), output=str(output)
            )
        return Cell(
            arm=self.arm,
            kind=kind,
            lr=lr,
            seed=seed,
            config=config,
            measures=measures,
            data_sha256=self.data.sha256,
        )
