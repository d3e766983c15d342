"""The rows of a comparison: found, sliced where asked, and hashed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.compare.config import CompareConfig
from lorakit.data.rows import Rows
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError, DataError
from lorakit.files import write_text


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """Where the rows of every run lie.

    Attributes:
        train: training rows.
        validation: validation rows; None where a share is held out, or where there are none.
        evaluation: rows of the final score, or None.
        evaluation_split: which split of them, where the same place also holds the others.
        sha256: of the rows' content, by those three names.
        num_rows: how many there are, by the same names.
    """

    train: str
    validation: str | None
    evaluation: str | None
    evaluation_split: str | None
    sha256: Mapping[str, str]
    num_rows: Mapping[str, int]

    @property
    def source(self) -> tuple[str, str | None] | None:
        """Rows of the final score and which split of them, or None."""
        return None if self.evaluation is None else (self.evaluation, self.evaluation_split)

    def section(self) -> dict[str, Any]:
        """What goes into the data section of a training config."""
        return {"train": self.train, "validation": self.validation}


def find_data(config: CompareConfig, *, write: bool = True) -> DataFiles:
    """Read the rows once, draw the slices that `rows` asks for, and hash what remains.

    Slices are written to `output/data/`, so that every run and every reader sees the same file.

    Args:
        config: the comparison.
        write: False changes nothing on the disk.

    Raises:
        DataError: a file that is missing, broken, empty, or shorter than its slice.
        ConfigError: a slice of validation rows that are held out by share.
    """
    section = config.base.get("data")
    data: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
    train, validation = str(data["train"]), data.get("validation")
    if validation is None and config.rows.validation is not None:
        raise ConfigError(
            "there are no validation rows to draw from",
            where="rows.validation",
            expected="base.data.validation",
            remedy="name validation rows, or set base.data.validation_share alone",
        )
    wanted = {"train": (train, config.rows.train)}
    if validation is not None:
        wanted["validation"] = (str(validation), config.rows.validation)
    if config.eval.data is not None:
        wanted["eval"] = (config.eval.data, None)
    names: dict[str, str] = {}
    splits: dict[str, str | None] = {}
    hashes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, (source, limit) in wanted.items():
        found = _located(source, config.data)
        split = _split(name, found, num_named=[w[0] for w in wanted.values()].count(source))
        rows = load_rows(found, split=split)
        if limit is not None:
            rows = _drawn(rows, limit, seed=config.rows.seed, where=f"rows.{name}")
            found = str(Path(config.output) / "data" / f"{name}.jsonl")
            if write:
                _write(rows, Path(found))
        splits[name] = split
        names[name], hashes[name], counts[name] = found, rows.sha256, len(rows)
    return DataFiles(
        train=names["train"],
        validation=names.get("validation"),
        evaluation=names.get("eval"),
        evaluation_split=splits.get("eval"),
        sha256=hashes,
        num_rows=counts,
    )


def _split(name: str, source: str, *, num_named: int) -> str | None:
    # A directory or hub id that is named twice has one split for each; a file has none.
    if num_named < 2 or Path(source).is_file():
        return None
    return "test" if name == "eval" else name


def _located(source: str, root: str | None) -> str:
    if root is None or Path(source).is_absolute():
        return source
    return str(Path(root) / source)


def _drawn(rows: Rows, count: int, *, seed: int, where: str) -> Rows:
    if count > len(rows):
        raise DataError(
            "there are fewer rows than the slice asks for",
            where=f"{where}, {rows.source}",
            expected=f"at least {count:,} rows",
            found=f"{len(rows):,}",
            remedy="ask for fewer, or for null: all",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select(sorted(order[:count]))


def _write(rows: Rows, path: Path) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
