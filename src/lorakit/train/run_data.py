"""The rows of a run, and the examples made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError, DataError
from lorakit.train.config import TrainConfig
from lorakit.train.loaders import Collate, validation_batches
from lorakit.train.objectives.base import ExampleSet, Objective

# Rows that are looked at together.
_LOOK_AT = 64


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The rows of a run and the examples made of them."""

    train_rows: Rows
    train: ExampleSet
    validation_rows: Rows | None
    validation: ExampleSet | None

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of the rows' content."""
        validation = self.validation_rows
        return {
            "train": self.train_rows.sha256,
            "validation": None if validation is None else validation.sha256,
        }

    def to_json(self) -> dict[str, Any]:
        """Sources, hashes, counts, and what tokenising found."""
        record = {"train": {**self.train_rows.to_json(), "report": self.train.report.to_json()}}
        if self.validation_rows is not None and self.validation is not None:
            record["validation"] = {
                **self.validation_rows.to_json(),
                "report": self.validation.report.to_json(),
            }
        return record

    def highest_ids(self, collate: Collate) -> Iterator[int]:
        """The highest token id of batches of all rows, padding included; made as they are asked."""
        for examples in (self.train, self.validation):
            if examples is not None:
                for batch in validation_batches(examples, collate, _LOOK_AT):
                    yield int(batch["input_ids"].max())

    def notes(self) -> list[str]:
        """What tokenising found that the user should know, one sentence each."""
        found = list(self.train.report.notes)
        if self.validation is not None:
            held = (f"validation: {note}" for note in self.validation.report.notes)
            found += [note for note in held if note.removeprefix("validation: ") not in found]
        return found


def read_rows(config: TrainConfig) -> tuple[Rows, Rows | None]:
    """The rows for training, and for validation if there are any.

    Raises:
        DataError: rows that are missing, broken, empty, or too few to hold some out.
        ConfigError: one file for both.
    """
    options = config.data
    train_rows = load_rows(options.train)
    validation_rows: Rows | None = None
    if options.validation is not None:
        # A directory or hub id that is named twice has one split for each.
        split = "validation" if options.validation == options.train else None
        if split is not None and Path(options.train).is_file():
            raise ConfigError(
                "the validation rows are the training rows",
                where="data.validation",
                expected="rows that are not trained on",
                found=options.train,
                remedy="hold some out with data.validation_share: 0.1, or name another file",
            )
        validation_rows = load_rows(options.validation, split=split)
    elif options.validation_share is not None:
        train_rows, validation_rows = _hold_out(train_rows, options.validation_share, config.seed)
    return train_rows, validation_rows


def build_data(rows: tuple[Rows, Rows | None], objective: Objective) -> RunData:
    """Rows to examples.

    Raises:
        DataError: a row that does not fit.
    """
    train_rows, validation_rows = rows
    validation: ExampleSet | None = None
    train = objective.build(train_rows, label="tokenising")
    if validation_rows is not None:
        validation = objective.build(validation_rows, label="tokenising validation")
    return RunData(
        train_rows=train_rows,
        train=train,
        validation_rows=validation_rows,
        validation=validation,
    )


def _hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    num_held = max(1, round(share * len(rows)))
    if num_held >= len(rows):
        raise DataError(
            "too few rows to hold some out for validation",
            where=rows.source,
            expected="at least two rows",
            found=f"{len(rows)} rows, {num_held} of them held out",
            remedy="name validation rows of their own, or lower data.validation_share",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[num_held:])), rows.select(sorted(order[:num_held]))
