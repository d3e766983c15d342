"""From what the user names (a file, a directory, a hub id, a list) to rows."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from lorakit.data.readers import READERS, reader_for
from lorakit.data.rows import Origin, Row, Rows
from lorakit.data.splits import DEFAULT_SPLIT, split_aliases, split_of, stem_is
from lorakit.errors import DataError, nearest

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def load_rows(
    source: str | Path | list[Row], split: str | None = None, limit: int | None = None
) -> Rows:
    """Read a data set.

    Args:
        source: a .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file; a directory of such
            files, or one that `datasets` saved (`save_to_disk`); a hub id, "owner/name" or
            "owner/name:config"; or a list of dicts.
        split: "train", "validation", "test" or another name, for a directory or a hub id. A
            directory whose files are named by split gives "train" unless told.
        limit: take only the first rows.

    Raises:
        DataError: the source is missing, of an unknown type, broken, or empty.
    """
    if limit is not None and limit < 1:
        raise DataError("limit must be at least 1", found=str(limit), remedy="leave limit out")
    if isinstance(source, list):
        rows = _from_list(source, split)[:limit]
    else:
        rows = _from_name(source, split, limit)
    if not len(rows):
        raise DataError(
            "the data is empty",
            where=rows.source,
            expected="at least one row",
            found="0 rows",
            remedy="check that the right file was written, and that it was written whole",
        )
    return rows


def _from_list(source: list[Row], split: str | None) -> Rows:
    if split is not None:
        raise _no_splits("a list of rows", split)
    for number, row in enumerate(source, start=1):
        if not isinstance(row, dict):
            raise DataError(
                "a row must be a dict",
                where=f"row {number}",
                expected="a dict from column name to value",
                found=type(row).__name__,
            )
    origins = [Origin("row", number) for number in range(1, len(source) + 1)]
    return Rows(list(source), origins, "a list of rows")


def _from_name(source: str | Path, split: str | None, limit: int | None) -> Rows:
    path = Path(source).expanduser()
    if _is_saved(path):
        hub = importlib.import_module("lorakit.data.hub")
        return hub.load_saved_rows(path, str(source), split, limit)
    if path.is_dir():
        files = _files_of(path, split)
        return _read(files, str(source), limit)
    if path.exists():
        if split is not None:
            raise _no_splits(str(source), split)
        return _read([path], str(source), limit)
    if isinstance(source, Path) or not _may_be_hub_id(source):
        raise _missing(path)
    hub = importlib.import_module("lorakit.data.hub")
    return hub.load_hub_rows(source, split, limit)


def _is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote it: one data set, or one per split."""
    one = (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()
    return one or (directory / "dataset_dict.json").is_file()


def _read(files: list[Path], source: str, limit: int | None) -> Rows:
    pairs = itertools.islice(itertools.chain.from_iterable(map(_read_file, files)), limit)
    rows: list[Row] = []
    origins: list[Origin] = []
    for origin, row in pairs:
        rows.append(row)
        origins.append(origin)
    return Rows(rows, origins, source)


def _read_file(path: Path) -> Iterator[tuple[Origin, Row]]:
    reader = reader_for(path)
    if reader is None:
        raise DataError(
            "unknown type of data file",
            where=str(path),
            expected=_types(),
            found=f"a name that ends in {path.suffix!r}" if path.suffix else "a name without type",
            remedy="convert the file, or give it the name of what it is",
        )
    return reader(path)


def _files_of(directory: Path, split: str | None) -> list[Path]:
    """The data files of a directory, sorted; only those of one split when files are named so."""
    files = sorted(
        file
        for file in directory.iterdir()
        if file.is_file() and reader_for(file) is not None and not file.name.startswith(".")
    )
    if not files:
        entries = sorted(entry.name for entry in directory.iterdir())
        raise DataError(
            "no data files in this directory",
            where=str(directory),
            expected=_types(),
            found=", ".join(entries[:8]) or "an empty directory",
            remedy="name the file or the directory that holds the data",
        )
    splits = {file: split_of(file) for file in files}
    if split is None:
        if not any(splits.values()):
            return files
        split = DEFAULT_SPLIT
    aliases = split_aliases(split)
    chosen = [file for file in files if stem_is(file, aliases)]
    if not chosen:
        raise DataError(
            f"no files of the split {split!r} in this directory",
            where=str(directory),
            expected=f"names that start with {' or '.join(aliases)}",
            found=", ".join(file.name for file in files[:8]),
            remedy="name the split (split=...) or the file itself",
        )
    return chosen


def _may_be_hub_id(source: str) -> bool:
    path = Path(source)
    if not _HUB_ID.fullmatch(source) or reader_for(path) is not None:
        return False
    if len(path.parts) > 1:
        return not Path(path.parts[0]).is_dir()
    return not nearest(source, _names_beside(path))


def _names_beside(path: Path) -> list[str]:
    parent = path.parent
    return sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []


def _missing(path: Path) -> DataError:
    names = _names_beside(path)
    close = nearest(path.name, names)
    if not path.parent.is_dir():
        found = f"no directory {path.parent}"
    elif close:
        found = f"the nearest names there: {', '.join(close)}"
    else:
        found = f"there: {', '.join(names[:8])}" if names else "an empty directory"
    return DataError(
        "no such data file or directory",
        where=str(path),
        expected="a file, a directory or a hub id (owner/name)",
        found=found,
        remedy=f"did you mean {path.parent / close[0]}?" if close else "check the path",
    )


def _no_splits(source: str, split: str) -> DataError:
    return DataError(
        "a single file has no splits",
        where=source,
        found=f"split={split!r}",
        remedy="leave split out, or name the directory that holds one file per split",
    )


def _types() -> str:
    return f"one of {', '.join(READERS)}, or a text format with .gz"
