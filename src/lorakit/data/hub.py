"""Rows from the Hugging Face hub, or saved by `datasets`, which is slow to import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub

from lorakit.data.rows import Origin, Rows, without_fillers
from lorakit.data.splits import DEFAULT_SPLIT, split_aliases
from lorakit.errors import DataError

PROBE_TIMEOUT_S = 10.0


def load_hub_rows(name: str, split: str | None = None, limit: int | None = None) -> Rows:
    """The rows of one split of a data set on the hub (or in its local cache).

    Args:
        name: "owner/name", or "owner/name:config" where the data set has several.
        split: the split; "train" unless told.
        limit: take only the first rows.

    Raises:
        DataError: the hub cannot be reached, or has no such data set, config or split.
    """
    repository, _, config = name.partition(":")
    split = split or DEFAULT_SPLIT
    try:
        with _cache_only_when_offline(repository):
            table = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:
        # The library lets through the errors of whatever lies below: httpx, fsspec, pyarrow.
        raise _hub_error(error, name, split) from error
    if not isinstance(table, datasets.Dataset):
        raise DataError("the hub returned no table", where=name, found=type(table).__name__)
    return _rows_of(table, name, f"{name}[{split}]", limit)


def load_saved_rows(
    directory: Path, name: str, split: str | None = None, limit: int | None = None
) -> Rows:
    """The rows of a data set that `save_to_disk` wrote, or of one of its splits.

    Args:
        directory: where it is.
        name: as the user gave it.
        split: of a `DatasetDict`; "train" unless told, also by another usual name of it.
        limit: take only the first rows.

    Raises:
        DataError: it cannot be read, or has no such split.
    """
    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        # As from the hub: the errors of whatever lies below.
        raise DataError(
            "cannot read this saved data set",
            where=name,
            expected="a directory as save_to_disk of the datasets library writes it",
            found=" ".join(str(error).split())[:300],
            remedy="save it again, or save it as Parquet: dataset.to_parquet(...)",
        ) from error
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise DataError(
                "a saved data set of its own has no splits",
                where=name,
                found=f"split={split!r}",
                remedy="leave split out, or save a DatasetDict",
            )
        return _rows_of(saved, name, name, limit)
    aliases = split_aliases(split or DEFAULT_SPLIT)
    chosen = next((alias for alias in aliases if alias in saved), None)
    if chosen is None:
        raise DataError(
            f"no split {split or DEFAULT_SPLIT!r} in this saved data set",
            where=name,
            expected=" or ".join(aliases),
            found=", ".join(map(str, saved)) or "no splits",
            remedy="name the directory of one split",
        )
    return _rows_of(saved[chosen], name, f"{name}[{chosen}]", limit)


def _rows_of(table: datasets.Dataset, name: str, place: str, limit: int | None) -> Rows:
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    rows = [without_fillers(row) for row in table.to_list()]
    origins = [Origin(f"{place} row", number) for number in range(1, len(rows) + 1)]
    return Rows(rows, origins, name)


@contextmanager
def _cache_only_when_offline(repository: str) -> Iterator[None]:
    """Look only into the local cache when the hub does not answer.

    Without this the library asks again and again, for half a minute, before it says so.
    """
    before = datasets.config.HF_HUB_OFFLINE
    try:
        if not before:
            huggingface_hub.HfApi().dataset_info(repository, timeout=PROBE_TIMEOUT_S)
    except Exception as error:
        # Anything but a dead line (a wrong name, a private data set) is left to the load itself.
        datasets.config.HF_HUB_OFFLINE = _is_offline(error)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_error(error: Exception, name: str, split: str) -> DataError:
    text = " ".join(str(error).split())
    offline = _is_offline(error)
    return DataError(
        "the hub cannot be reached" if offline else "cannot load this data set from the hub",
        where=f"{name}, split {split}",
        expected="a local file or directory, or a data set on the hub",
        found=f"no such local path; {type(error).__name__}: {text[:300]}",
        remedy=(
            "check the path, or download the data where there is a network"
            if offline
            else "check the name, the config (owner/name:config) and the split"
        ),
    )


def _is_offline(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (ConnectionError, TimeoutError)) or type(seen).__name__ in {
            "ConnectError",
            "ConnectTimeout",
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ProxyError",
        }:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
