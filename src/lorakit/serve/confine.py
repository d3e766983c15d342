"""Paths that come over the network lead into the directory of adapters, and nowhere else."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import AdapterFileError
from lorakit.formats.passport import PASSPORT_NAME
from lorakit.formats.peft import TENSORS_NAME
from lorakit.formats.peft_config import CONFIG_NAME

_READ = (CONFIG_NAME, TENSORS_NAME, PASSPORT_NAME)
# Where training leaves what it learned, below its output directory.
_TRAINED = "adapter"


def adapter_in(directory: Path) -> Path | None:
    """The adapter that a directory is, or that training left in it as `adapter`.

    What another method learned is found too, so that it can be refused by name. None for what
    cannot be looked into: a name longer than the disk has names, a directory of somebody else's.
    """
    try:
        for place in (directory, directory / _TRAINED):
            if any((place / name).is_file() for name in (CONFIG_NAME, PASSPORT_NAME)):
                return place
    except OSError:
        return None
    return None


def adapter_inside(root: Path | None, path: str) -> Path:
    """The real directory of an adapter that a request names.

    A relative path counts from the adapters' directory; an absolute one, as clients of vLLM send,
    must lead into it.

    Args:
        root: the adapters' directory; None where the server has none.
        path: as it came in the request.

    Returns:
        The directory, or `adapter` in it where training left one: inside `root`, links followed,
        with safetensors in it; every file that will be read lies inside `root` too.

    Raises:
        AdapterFileError: it leads out, by itself or by a link, holds `..`, or holds no adapter.
    """
    if root is None:
        raise AdapterFileError(
            "this server has no directory of adapters", remedy="start it with --adapters DIR"
        )
    if "\0" in path or ".." in Path(path).parts:
        raise _outside()
    try:
        return _inside(root, path)
    except OSError as error:
        raise _nothing(path) from error


def _inside(root: Path, path: str) -> Path:
    real_root = root.resolve()
    directory = (real_root / path).resolve()
    if directory.is_relative_to(real_root) and directory != real_root:
        directory = (adapter_in(directory) or directory).resolve()
    places = [directory, *((directory / name).resolve() for name in _READ)]
    if directory == real_root or not all(place.is_relative_to(real_root) for place in places):
        raise _outside()
    if not (directory / CONFIG_NAME).is_file():
        raise _nothing(path)
    if not (directory / TENSORS_NAME).is_file():
        raise AdapterFileError(
            f"the adapter has no {TENSORS_NAME}",
            expected="safetensors: a pickle can run code when it is opened",
        )
    return directory


def _nothing(path: str) -> AdapterFileError:
    return AdapterFileError(
        "there is no adapter here", expected=f"a directory with {CONFIG_NAME}", found=path[:200]
    )


def _outside() -> AdapterFileError:
    return AdapterFileError(
        "the path leads out of the directory of adapters",
        expected="a path below --adapters DIR, without .. and without links out of it",
    )
