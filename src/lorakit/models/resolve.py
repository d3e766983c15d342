"""From what the user calls a model to a local directory with a config and safetensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorakit.errors import ModelError, nearest
from lorakit.files import read_json
from lorakit.models.gguf import converted
from lorakit.models.named import NAMED_MODELS, find_named
from lorakit.models.parts import require_whole

Origin = Literal["hub", "directory", "gguf", "wheel"]
Files = Literal["all", "small", "config"]

_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Second copies of the weights in other layouts: often as large as the model itself.
_HUB_SKIP = ("original/*", "consolidated*", "onnx/*", "openvino/*", "*/*.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """Where a model's files are.

    Attributes:
        ref: what the user wrote.
        name: the short name for tables and run records.
        path: a local directory with config.json, and safetensors unless only the config was asked.
        origin: where the files came from.
    """

    ref: str
    name: str
    path: Path
    origin: Origin


def resolve_model(ref: str | os.PathLike[str], *, files: Files = "all") -> ResolvedModel:
    """The local directory of a model: found, downloaded or, for a GGUF file, converted once.

    Args:
        ref: a named model, a directory, a .gguf file or a hub id, tried in that order.
        files: what is downloaded from a hub: all, the small ones but no weights, or config.json
            alone.

    Raises:
        ModelError: nothing is there, or what is there is not a model.
    """
    text = os.fspath(ref)
    path = Path(text).expanduser()
    if text in NAMED_MODELS and not path.exists():
        found = find_named(text)
        directory = converted(found, name=text) if found.suffix == ".gguf" else found
        return ResolvedModel(ref=text, name=text, path=directory, origin="wheel")
    if path.is_dir():
        name = path.resolve().name
        return ResolvedModel(ref=text, name=name, path=_model_directory(path), origin="directory")
    if path.suffix.lower() == ".gguf":
        directory = converted(path, name=path.stem)
        return ResolvedModel(ref=text, name=path.stem, path=directory, origin="gguf")
    if path.is_file():
        raise ModelError(
            "this file is not a model",
            where=text,
            expected="a .gguf file, or the directory that holds config.json and *.safetensors",
            remedy="give the directory, or a GGUF file",
        )
    return ResolvedModel(ref=text, name=text, path=_from_hub(text, files), origin="hub")


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory as a dict.

    Raises:
        ModelError: it is missing, not JSON, or not an object.
    """
    file = directory / "config.json"
    expected = "a JSON object, as transformers writes it"
    try:
        config = read_json(file)
    except FileNotFoundError:
        require_whole(directory)
        raise ModelError(
            "the model directory has no config.json",
            where=str(directory),
            found=_listing(directory),
            remedy=_remedy_without_config(directory),
        ) from None
    except OSError as error:
        raise ModelError("config.json cannot be read", where=str(file), found=str(error)) from error
    except ValueError as error:
        raise ModelError(
            "config.json is not JSON", where=str(file), expected=expected, found=str(error)
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            "config.json is not an object",
            where=str(file),
            expected=expected,
            found=f"a {type(config).__name__}",
        )
    return config


def _model_directory(path: Path) -> Path:
    read_config(path)
    if (path / "adapter_config.json").is_file():
        # transformers would load that adapter on its own, silently, into what we call the base.
        raise ModelError(
            "the model directory also holds an adapter",
            where=str(path / "adapter_config.json"),
            expected="a base model alone",
            remedy="move the adapter's files to a directory of their own",
        )
    return path


def _remedy_without_config(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "this directory is an adapter: give its base here, and the adapter as the adapter"
    ggufs = sorted(directory.glob("*.gguf"))
    if ggufs:
        return f"give the GGUF file itself: {ggufs[0]}"
    return "give the directory that holds config.json and *.safetensors"


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return shown or "an empty directory"


def _from_hub(ref: str, files: Files) -> Path:
    patterns: dict[Files, list[str]] = {
        "all": list(_HUB_FILES),
        "small": [pattern for pattern in _HUB_FILES if "safetensors" not in pattern],
        "config": ["config.json"],
    }
    try:
        path = snapshot_download(
            ref, allow_patterns=patterns[files], ignore_patterns=list(_HUB_SKIP)
        )
    except HFValidationError as error:
        raise _missing(ref, "no such directory or file, and not a hub id") from error
    except LocalEntryNotFoundError as error:
        raise _missing(
            ref, "no such directory or file; the model hub cannot be reached and has no cached copy"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _missing(ref, f"no such directory or file, and the hub says: {reason}") from error
    return _model_directory(Path(path))


def _missing(ref: str, found: str) -> ModelError:
    close = nearest(ref.lower(), NAMED_MODELS)
    remedy = f"did you mean {close[0]!r}? " if close else ""
    return ModelError(
        f"the model {ref!r} cannot be found",
        expected="a directory, a .gguf file, a hub id such as 'owner/name', or one of "
        + ", ".join(sorted(NAMED_MODELS)),
        found=found,
        remedy=remedy + "check the spelling and the connection, or give a local directory",
    )
