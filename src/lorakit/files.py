"""Writes that are whole or absent: temporary name, flush, rename."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorakit.errors import ConfigError, OutputError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left there stays
    fcntl = None

_LOCK, _PARTIAL = ".lock", ".partial"
_SETTLED_S = 60.0


def require_free(path: str | Path, *, past_killed: bool = False) -> Path:
    """The path, if it does not exist yet or is an empty directory.

    Args:
        path: the output.
        past_killed: what a killed process can leave before its first whole file, the lock of
            `only_writer` and half-written files, does not count; `only_writer` finds out whether
            it lives, and removes what is left of a dead one.

    Raises:
        OutputError: the path is a file, or a directory with something in it.
    """
    path = Path(path)
    found = list(path.iterdir()) if path.is_dir() else []
    if past_killed:
        found = [entry for entry in found if entry.name != _LOCK and not _is_half_written(entry)]
    if found:
        raise OutputError(
            "the output directory is not empty",
            where=str(path),
            expected="a path that does not exist, or an empty directory",
            found=", ".join(sorted(entry.name for entry in found)[:8]),
            remedy="choose another output, or remove this one yourself",
        )
    if path.exists() and not path.is_dir():
        raise OutputError(
            "the output is a file",
            where=str(path),
            expected="a directory",
            remedy="choose another output",
        )
    return path


@contextmanager
def only_writer(directory: str | Path) -> Iterator[None]:
    """Inside the block no other process that asks for the same may write into a directory.

    The lock is the system's: it ends with the process, however that ends. What a writer that was
    killed left half-written there is removed.

    Args:
        directory: made where it does not exist.

    Raises:
        OutputError: another process writes there.
    """
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                "another process writes into this directory",
                where=str(directory),
                remedy="wait for it to end, or choose another output",
            ) from error
    try:
        _remove_half_written(directory)
        yield
    finally:
        # While it is held: whoever comes now finds no file, and makes one of its own.
        with suppress(OSError):
            (directory / _LOCK).unlink()
        lock.release()


def _remove_half_written(directory: Path) -> None:
    for entry in directory.iterdir():
        if not _is_half_written(entry):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


def _is_half_written(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(_PARTIAL)


# What safetensors and torch.save raise for a failed write. The text of the first carries the
# system's reason; the second's stream does not know it.
_FAILED_WRITES = {
    "SafetensorError": ("os error",),
    "RuntimeError": ("iostream error", "inline_container"),
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the system's write errors below this block into one clear OutputError."""
    try:
        yield
    except OSError as error:
        raise _output_error(error, Path(path)) from error
    except Exception as error:
        signs = _FAILED_WRITES.get(type(error).__name__, ())
        if any(sign in str(error).lower() for sign in signs):
            raise _output_error(error, Path(path)) from error
        raise


def _output_error(error: BaseException, path: Path) -> OutputError:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.ENOSPC or "os error 28" in text:
        return OutputError(
            "the disk is full",
            where=str(path),
            found=f"{_free_bytes(path):,} bytes free",
            remedy="free some space or choose another output; nothing was left half-written",
        )
    found = text if number is not None else f"{text}, {_free_bytes(path):,} bytes free"
    return OutputError(
        "cannot write here", where=str(path), found=found, remedy="choose another output"
    )


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def atomic_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling directory that takes the name `path` only if the block succeeds.

    Args:
        path: the final directory.
        replace: put an existing directory of that name away once the new one is whole; otherwise
            the path must be free (see `require_free`).

    Raises:
        OutputError: the path is taken, or the disk refuses.
    """
    path = Path(path)
    if not replace:
        require_free(path)
    with temporary_beside(path) as staging, writing(path):
        yield staging
        _flush(staging)
        staging.chmod(0o755)
        _swap(staging, path)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary directory on the disk that `path` is or will be on, gone behind the block.

    A lock of the system's says that it is in use, and ends with the process however that ends:
    those of processes that were killed are removed when another is made for the same path.

    Args:
        path: its parent is made where it does not exist.

    Raises:
        OutputError: the disk refuses.
    """
    path = path.absolute()
    prefix = f".{path.name}."
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent, prefix)
        made = Path(tempfile.mkdtemp(prefix=prefix, suffix=_PARTIAL, dir=path.parent))
    handle = _held(made)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _remove_abandoned(directory: Path, prefix: str) -> None:
    for entry in directory.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):
        with suppress(OSError):
            # A new one is not held for a moment.
            if time.time() - entry.stat().st_mtime < _SETTLED_S:
                continue
            handle = _held(entry)
            if handle is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(handle)


def _held(directory: Path) -> int | None:
    """Hold a directory until what is returned is closed; None where another does, or none can."""
    if fcntl is None:
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def files_into(directory: str | Path) -> Iterator[Path]:
    """A temporary place; what the block puts below it in one folder goes into `directory`.

    Other files there stay; a file of the same name is replaced. Each is whole or as it was before,
    and none is moved if the block fails.

    Args:
        directory: made where it does not exist.

    Raises:
        OutputError: it is a file, or the disk refuses.
    """
    directory = Path(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=_PARTIAL, dir=directory))
    try:
        with writing(directory):
            yield staging
            _flush(staging)
            for file in sorted(staging.rglob("*")):
                if file.is_file():
                    # Behind the folder that the block made.
                    target = directory.joinpath(*file.relative_to(staging).parts[1:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, path: Path) -> None:
    """Give the new directory its name; an old one is left at `staging`, or gone."""
    if path.is_dir() and any(path.iterdir()):
        if _exchange(staging, path):
            return
        # In two steps, the name is free in between: keep the old one until the new is in.
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        try:
            staging.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        if path.is_dir():
            path.rmdir()
        staging.rename(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system or its disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may be hostile.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: see `parse_json`.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def read_back(file: Path, *keys: str, of: str, remedy: str) -> dict[str, Any]:
    """A JSON object that an earlier run left, with the keys that are needed of it.

    Args:
        file: written by `write_json`.
        keys: must be there.
        of: whose record it is, for the error: "a cell".
        remedy: what to do where it is damaged.

    Raises:
        ConfigError: the file cannot be read, is no JSON object, or lacks a key.
    """
    try:
        record = read_json(file)
        for key in keys:
            record[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{of}'s record is damaged", where=str(file), found=why, remedy=remedy
        ) from error
    return record


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
