"""The adapters on disk: their names, where they lie, and what their passports say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from lorakit.adapters.attachments import check_name
from lorakit.errors import (
    AdapterFileError,
    LorakitError,
    RequestError,
    StateError,
    UnknownAdapterError,
    nearest,
)
from lorakit.formats.passport import PASSPORT_NAME
from lorakit.formats.peft import TENSORS_NAME
from lorakit.formats.peft_config import CONFIG_NAME, read_config
from lorakit.methods.files import read_saved
from lorakit.serve.confine import adapter_in

_FILES = (CONFIG_NAME, TENSORS_NAME, PASSPORT_NAME)
# Parts of a passport that grow with the model and tell a reader of a list nothing.
_BULKY = ("sites", "samples")

Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter's directory, as it was at one moment.

    Attributes:
        path: the directory.
        stamp: time of change and size of each of its files; another stamp, another adapter.
    """

    path: Path
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Facts:
    """What an adapter says about itself, without its tensors."""

    r: int | None
    passport: Mapping[str, Any]
    problem: str | None


class Catalog:
    """Names and their directories; from any thread.

    Args:
        root: every directory in it that holds an adapter, itself or as `adapter` (what training
            leaves), has its own name; nothing outside it is ever read. None: names are added one
            by one, from anywhere.

    Raises:
        RequestError: `root` is not a directory.
    """

    def __init__(self, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise RequestError(
                "the directory of adapters is not there", where=str(root), expected="a directory"
            )
        self.root = None if root is None else root.resolve()
        self._added: dict[str, Path] = {}
        self._hidden: set[str] = set()
        self._facts: dict[str, tuple[Source, Facts]] = {}
        self._lock = Lock()

    def find(self, name: str) -> Source:
        """Where the adapter of this name lies now.

        Raises:
            UnknownAdapterError: no such name.
            AdapterFileError: its files are not there any more.
        """
        path = self._path_of(name)
        if path is None:
            close = nearest(name, self.names(), n=3)
            raise UnknownAdapterError(
                f"no adapter named {name!r} is served",
                found=", ".join(close) or None,
                remedy="GET /v1/models lists what is served",
            )
        return self.source(path)

    def source(self, path: Path) -> Source:
        """The directory with the stamps of its files.

        Raises:
            AdapterFileError: there is no adapter, or not one whose tensors are safetensors.
            RequestError: the directory, or a file in it, lies outside the root.
        """
        real = path.resolve()
        for place in (real, *((real / name).resolve() for name in _FILES)):
            if self.root is not None and (self.root not in place.parents):
                raise RequestError(
                    "the adapter lies outside the directory of adapters",
                    where=str(path),
                    expected=f"a directory below {self.root}",
                )
        saved = read_saved(real) if not (real / CONFIG_NAME).is_file() else None
        if saved is not None:
            raise AdapterFileError(
                f"what the method {saved.name!r} learned cannot share a batch with others",
                where=str(path),
                expected="a LoRA or DoRA adapter in PEFT's layout",
                remedy="serve the merged model, or evaluate it with lorakit eval",
            )
        if not (real / TENSORS_NAME).is_file():
            raise AdapterFileError(
                "the adapter has no safetensors, and nothing else is loaded into a server",
                where=str(path),
                expected=TENSORS_NAME,
                remedy="read and write it once: Adapter.load(path).save(new_path)",
            )
        return Source(real, _stamp(real))

    def add(self, name: str, path: Path) -> None:
        """Serve the directory under this name from now on."""
        with self._lock:
            self._hidden.discard(name)
            self._added[name] = path

    def remove(self, name: str) -> None:
        """Serve the name no longer.

        Raises:
            UnknownAdapterError: no such name.
        """
        if self._path_of(name) is None:
            self.find(name)
        with self._lock:
            self._added.pop(name, None)
            self._hidden.add(name)

    def default_path(self, name: str) -> Path:
        """Where an adapter lies of which the name alone was given.

        Raises:
            RequestError: there is no directory of adapters.
        """
        if self.root is None:
            raise RequestError(
                "no path was given", where=name, remedy="name the adapter's directory"
            )
        return adapter_in(self.root / name) or self.root / name

    def names(self) -> list[str]:
        """Every name that is served, sorted."""
        with self._lock:
            return sorted({*self._added, *(n for n in self._on_disk() if n not in self._hidden)})

    def path(self, name: str) -> Path:
        """The directory of a name that is served, looked at or not."""
        return self._path_of(name) or self.default_path(name)

    def facts(self, name: str) -> tuple[Source | None, Facts]:
        """What the adapter says about itself; read again when its files have changed."""
        try:
            source = self.find(name)
        except LorakitError as error:
            return None, Facts(None, {}, _reason(error))
        with self._lock:
            known = self._facts.get(name)
        if known is None or known[0] != source:
            known = (source, _read_facts(source.path))
            with self._lock:
                self._facts[name] = known
        return known

    def _path_of(self, name: str) -> Path | None:
        with self._lock:
            if name in self._added:
                return self._added[name]
            if self.root is None or name in self._hidden or not _is_name(name):
                return None
        return adapter_in(self.root / name)

    def _on_disk(self) -> Iterator[str]:
        for path in self.root.iterdir() if self.root is not None else ():
            if _is_name(path.name) and adapter_in(path) is not None:
                yield path.name


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except StateError:
        return False
    return True


def _stamp(path: Path) -> Stamp:
    found: list[tuple[int, int]] = []
    for name in _FILES:
        try:
            status = (path / name).stat()
        except FileNotFoundError:
            found.append((0, -1))
        else:
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


def _read_facts(path: Path) -> Facts:
    try:
        config = read_config(path)
        document = read_saved(path).passport
    except LorakitError as error:
        return Facts(None, {}, _reason(error))
    # A linear layer's weight, named as a parameter, may be served: its tensors tell.
    stacked = [
        key for key in _names(config.get("target_parameters")) if not key.endswith(".weight")
    ]
    if stacked:
        what = "it changes parameters that are no layer of their own (target_parameters)"
        return Facts(None, {}, f"{what}: {', '.join(stacked[:4])}")
    r = config.get("r")
    passport = {k: _slim(v) for k, v in document.items() if k not in _BULKY}
    return Facts(r if isinstance(r, int) else None, passport, None)


def _names(value: object) -> list[str]:
    return [str(key) for key in value] if isinstance(value, list) else []


def _reason(error: LorakitError) -> str:
    """One line: what is wrong, and what was found."""
    return error.what if error.found is None else f"{error.what}: {error.found.splitlines()[0]}"


def _slim(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if k not in _BULKY}
    return value


def content_key(source: Source) -> str:
    """The hash of everything that decides what the adapter computes.

    Raises:
        AdapterFileError: the files changed since the source was looked at.
    """
    whole = hashlib.sha256()
    for name in _FILES:
        file = source.path / name
        if file.is_file():
            whole.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    whole.update(block)
    if _stamp(source.path) != source.stamp:
        raise AdapterFileError(
            "the adapter's files changed while they were read",
            where=str(source.path),
            remedy="write adapters under a new name, and rename the directory when it is whole",
        )
    return whole.hexdigest()
