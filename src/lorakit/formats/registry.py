"""The formats of other tools, by name."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import AdapterFileError, RequestError, unknown_name
from lorakit.formats.foreign import ForeignFormat
from lorakit.formats.gguf_lora import GgufFormat
from lorakit.formats.kohya import KohyaFormat
from lorakit.formats.loralib import LoralibFormat
from lorakit.formats.mlx import MlxFormat
from lorakit.formats.peft_config import CONFIG_NAME

PEFT = "peft"
FOREIGN: dict[str, ForeignFormat] = {
    found.name: found for found in (MlxFormat(), GgufFormat(), KohyaFormat(), LoralibFormat())
}
# PEFT's two layouts of stacked expert weights.
EXPERT_LAYOUTS = ("peft-0.18", "peft-0.19")
FORMATS = (PEFT, *FOREIGN, *EXPERT_LAYOUTS)


def format_of(path: Path) -> str:
    """The format that a path looks like.

    Raises:
        AdapterFileError: none.
    """
    # mlx-lm's directory has a configuration of the same name.
    for name, found in FOREIGN.items():
        if found.recognises(path):
            return name
    if (path / CONFIG_NAME).is_file():
        return PEFT
    raise AdapterFileError(
        "this is no adapter of a known format",
        where=str(path),
        expected="; ".join(f"{name}: {found.about}" for name, found in FOREIGN.items())
        + f"; {PEFT}: a directory with {CONFIG_NAME}",
        found="nothing" if not path.exists() else None,
        remedy="say what it is: --from FORMAT",
    )


def require_format(name: str) -> str:
    """The name, if there is such a format.

    Raises:
        RequestError: there is none.
    """
    if name not in FORMATS:
        raise unknown_name(RequestError, f"there is no format named {name!r}", name, FORMATS)
    return name
