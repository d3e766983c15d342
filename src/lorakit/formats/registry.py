"""The formats of other tools, by name."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from lorakit.errors import AdapterFileError, RequestError, unknown_name
from lorakit.formats.foreign import ForeignFormat
from lorakit.formats.gguf_lora import GgufFormat
from lorakit.formats.kohya import KohyaFormat
from lorakit.formats.loralib import LoralibFormat
from lorakit.formats.mlx import MLX_TENSORS, MlxFormat
from lorakit.formats.peft_config import CONFIG_NAME
from lorakit.formats.peft_tensors import OLD_NAME, TENSORS_NAME
from lorakit.formats.tensor_files import read_safetensors

PEFT = "peft"
FOREIGN: dict[str, ForeignFormat] = {
    found.name: found for found in (MlxFormat(), GgufFormat(), KohyaFormat(), LoralibFormat())
}
# PEFT's two layouts of stacked expert weights.
EXPERT_LAYOUTS = ("peft-0.18", "peft-0.19")
# Files that mean nothing without the configuration beside them.
_PARTS = (CONFIG_NAME, TENSORS_NAME, OLD_NAME, *MLX_TENSORS)
FORMATS = (PEFT, *FOREIGN, *EXPERT_LAYOUTS)


def format_of(path: Path) -> str:
    """The format that a path looks like.

    Raises:
        AdapterFileError: none; several in one directory; a file that is a part of a directory.
    """
    if path.name in _PARTS and (path.parent / CONFIG_NAME).is_file():
        raise AdapterFileError(
            "this file is a part of an adapter's directory",
            where=str(path),
            remedy=f"give the directory: {path.parent}",
        )
    found = [name for name, known in FOREIGN.items() if known.recognises(path)]
    # mlx-lm's directory has a configuration of the same name.
    has_tensors = any((path / name).is_file() for name in (TENSORS_NAME, OLD_NAME))
    if (path / CONFIG_NAME).is_file() and (has_tensors or not found):
        found.append(PEFT)
    if len(found) > 1:
        raise AdapterFileError(
            "the directory holds adapters of several formats",
            where=str(path),
            found=", ".join(found),
            remedy="say which: " + " or ".join(f"--from {name}" for name in found),
        )
    return found[0] if found else _unknown(path)


def _unknown(path: Path) -> NoReturn:
    inside = ""
    if path.suffix == ".safetensors" and path.is_file():
        inside = f"tensors such as {next(iter(read_safetensors(path)), 'none')}"
    raise AdapterFileError(
        "this is no adapter of a known format",
        where=str(path),
        expected="; ".join(f"{name}: {found.about}" for name, found in FOREIGN.items())
        + f"; {PEFT}: a directory with {CONFIG_NAME}",
        found=inside or (None if path.exists() else "nothing"),
        remedy="say what it is: --from FORMAT" if path.exists() else "check the path",
    )


def require_format(name: str) -> str:
    """The name, if there is such a format.

    Raises:
        RequestError: there is none.
    """
    if name not in FORMATS:
        raise unknown_name(RequestError, f"there is no format named {name!r}", name, FORMATS)
    return name
