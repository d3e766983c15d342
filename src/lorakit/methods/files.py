"""The directory of a method that has no layout of its own: lorakit.json and method.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.files import atomic_directory, read_json, write_json
from lorakit.formats.passport import PASSPORT_NAME
from lorakit.formats.peft_config import CONFIG_NAME, no_adapter_here

STATE_NAME = "method.safetensors"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """What a directory says about itself, tensors not read.

    Attributes:
        path: the directory.
        name: the method's name.
        options: what makes it again; for LoRA's layout empty, its own files tell.
        passport: all other facts.
    """

    path: Path
    name: str
    options: Mapping[str, Any]
    passport: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The base it was made on, as it was named, or None."""
        facts = self.passport.get("base")
        name = facts.get("name") if isinstance(facts, Mapping) else None
        name = name or self.passport.get("model")
        return name if isinstance(name, str) and name else None


def passport_document(
    name: str, options: Mapping[str, Any], num_params: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of lorakit.json for a method that is not in PEFT's layout."""
    own = {"format": _FORMAT, "method": name, "options": dict(options), "num_params": num_params}
    return {**own, **{key: value for key, value in facts.items() if key not in own}}


def write_method(path: Path, document: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a method's directory, whole or not at all; replaces an earlier one.

    Args:
        path: the directory.
        document: see `passport_document`.
        state: the learned tensors.

    Raises:
        OutputError: the disk refuses.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in sorted(state.items())}
    with atomic_directory(path, replace=True) as staging:
        save_file(tensors, str(staging / STATE_NAME), metadata={"format": "pt"})
        write_json(staging / PASSPORT_NAME, dict(document))


def read_saved(path: str | Path) -> Saved:
    """Read what a directory says about itself: any method's, PEFT's layout too.

    Raises:
        AdapterFileError: it holds nothing that was learned, or cannot be understood.
    """
    path = Path(path)
    file = path / PASSPORT_NAME
    in_peft_layout = (path / CONFIG_NAME).is_file()
    if not file.is_file():
        if in_peft_layout:
            return Saved(path, "lora", {}, {})
        raise no_adapter_here(path)
    document = _read_document(file)
    if in_peft_layout:
        return Saved(path, "lora", {}, document)
    name, options = document.get("method"), document.get("options")
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise AdapterFileError(
            "the passport does not name its method",
            where=str(file),
            expected="the keys method and options",
            remedy="copy the directory again, or train again",
        )
    facts = {k: v for k, v in document.items() if k not in ("format", "method", "options")}
    return Saved(path, name, dict(options), facts)


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = read_json(file)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            "the passport cannot be understood",
            where=str(file),
            found=str(error),
            remedy="copy the directory again",
        ) from error
    if document.get("format") != _FORMAT:
        raise AdapterFileError(
            "the passport has a format this version does not know",
            where=str(file),
            expected=str(_FORMAT),
            found=str(document.get("format")),
            remedy="update lorakit",
        )
    return document


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a method's directory, on the CPU.

    Raises:
        AdapterFileError: no such file, or a corrupt or truncated one.
    """
    file = path / STATE_NAME
    if not file.is_file():
        raise AdapterFileError(
            "the method has no tensors", where=str(path), expected=STATE_NAME, found="no such file"
        )
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            "the learned tensors cannot be read: the file is corrupt or truncated",
            where=str(file),
            found=str(error).splitlines()[0],
            remedy="copy the directory again, or train again",
        ) from error
