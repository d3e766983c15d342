"""The tensors of PEFT's file: read, and sorted by what their keys say they are.

What training leaves inside keys is taken out: the wrappers of torch.compile, FSDP and activation
checkpointing, DDP's `module.` in front, and the adapter's own name, which PEFT's `save_pretrained`
leaves out and a plain `state_dict()` has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorakit.errors import AdapterFileError

TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
OLD_NAME = "adapter_model.bin"
# No module of a model has such a name, so that they can stand anywhere.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = re.compile(r"^module\.(?=base_model\.)")
_NAME = r"(?:\.(?!weight$)(?P<{}>[^.]+))?"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    rf"lora_(?P<plain>[AB]){_NAME.format('plain_name')}\.weight"
    rf"|lora_embedding_(?P<embedding>[AB]){_NAME.format('embedding_name')}"
    rf"|lora_(?P<magnitude>magnitude)_vector{_NAME.format('magnitude_name')}(?:\.weight)?)$"
)
_TOKENS = re.compile(
    r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?$"
)
# PEFT's copy of an embedding or head trained beside has no adapter's name.
_SAVED = re.compile(r"\.modules_to_save(?:\.([^.]+)(?=\.))?\.")

Pairs = dict[str, dict[str, Tensor]]


@dataclass(slots=True)
class SortedTensors:
    """What the keys of a file mean.

    Attributes:
        pairs: module -> "A", "B" and, where they are there, "magnitude", "embedding", "base".
        biases: adapted module -> its trained bias.
        overrides: full parameter name -> value, of modules trained beside.
        tokens: embedding -> the rows of single tokens.
    """

    pairs: Pairs = field(default_factory=dict[str, dict[str, Tensor]])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    overrides: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors, from safetensors or from PEFT's older adapter_model.bin.

    Raises:
        AdapterFileError: no such file, or a corrupt, truncated or hostile one.
    """
    file = path / TENSORS_NAME
    old = path / OLD_NAME
    if not file.is_file() and not old.is_file():
        raise _no_tensors(path)
    try:
        if file.is_file():
            with safe_open(str(file), framework="pt") as handle:
                return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        loaded = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its reader stumbles over
        raise AdapterFileError(
            "the adapter's tensors cannot be read: the file is corrupt or truncated",
            where=str(file if file.is_file() else old),
            found=(str(error).splitlines() or [type(error).__name__])[0],
            remedy="copy or train the adapter again",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise AdapterFileError(
            "the file is not a state dict",
            where=str(old),
            expected="names and tensors, as PEFT's save_pretrained writes them",
            found=", ".join(map(str, list(loaded)[:6])) if isinstance(loaded, dict) else None,
            remedy="save the adapter again with PEFT's save_pretrained",
        )
    return {str(key): value for key, value in loaded.items()}


def _no_tensors(path: Path) -> AdapterFileError:
    endings = (".safetensors", ".bin", ".pt", ".pth", ".npz")
    others = sorted(file.name for file in path.iterdir() if file.suffix in endings)
    return AdapterFileError(
        "the adapter has no tensors",
        where=str(path),
        expected=TENSORS_NAME,
        found=", ".join(others[:6]) or "no such file",
        remedy=f"where another tool wrote it: lorakit convert {path} --to peft -o DIR --base REF"
        if others
        else "copy the directory again",
    )


def sort_tensors(tensors: Mapping[str, Tensor], path: Path) -> SortedTensors:
    """Say of every tensor of a file what it is.

    Args:
        tensors: by the file's own keys.
        path: the directory, for errors.

    Raises:
        AdapterFileError: keys of no known meaning, or of several adapters.
    """
    result = SortedTensors()
    refused: list[str] = []
    names: set[str] = set()
    cleaned = {_PARALLEL.sub("", _WRAPPER.sub("", key)): key for key in tensors}
    for clean, key in cleaned.items():
        name = clean.removeprefix(PREFIX)
        if ".original_module." in name:
            continue  # PEFT's copy of the base's own values, beside modules_to_save
        found, rows = _FACTOR.match(name), _TOKENS.match(name)
        if rows:
            names.update([rows["name"]] if rows["name"] else [])
            result.tokens[rows["module"]] = tensors[key]
        elif found:
            names.update(_adapter_name(found))
            letter = found["plain"] or found["embedding"] or found["magnitude"]
            pair = result.pairs.setdefault(found["module"], {})
            pair[letter] = tensors[key]
            if found["embedding"]:
                pair["embedding"] = tensors[key]
        elif name.endswith(".base_layer.bias"):
            result.biases[name.removesuffix(".base_layer.bias")] = tensors[key]
        elif name.endswith(".base_layer.weight"):
            # PEFT also writes the frozen weight of an adapted embedding: a copy of the base's.
            module = name.removesuffix(".base_layer.weight")
            result.pairs.setdefault(module, {})["base"] = tensors[key]
        elif ".lora_" in name or clean == name:
            refused.append(key)
        else:
            names.update(filter(None, _SAVED.findall(name)))
            parameter = _SAVED.sub(".", name)
            _refuse_another(result.overrides.get(parameter), tensors[key], f"{path}: {key}")
            result.overrides[parameter] = tensors[key]
    _refuse_several(names, path)
    if refused or len(cleaned) < len(tensors):
        refused = refused or sorted(set(tensors) - set(cleaned.values()))
        raise AdapterFileError(
            "the adapter has tensors that lorakit does not know",
            where=str(path / TENSORS_NAME),
            expected=f"{PREFIX}<module>.lora_A.weight and lora_B.weight",
            found=", ".join(refused[:8]) + (" ..." if len(refused) > 8 else ""),
        )
    return result


def _refuse_another(earlier: Tensor | None, value: Tensor, where: str) -> None:
    """Refuse a second value of a parameter; PEFT writes a resized embedding's twice, and equal."""
    if earlier is not None and not torch.equal(earlier, value):
        raise AdapterFileError(
            "the file has two values of one parameter",
            where=where,
            expected="one value, or two that are equal",
            remedy="save the adapter again with PEFT's save_pretrained",
        )


def _adapter_name(found: re.Match[str]) -> list[str]:
    keys = ("plain_name", "embedding_name", "magnitude_name")
    return [found[key] for key in keys if found[key]]


def _refuse_several(names: set[str], path: Path) -> None:
    if len(names) > 1:
        raise AdapterFileError(
            "the file holds several adapters",
            where=str(path / TENSORS_NAME),
            expected="one adapter",
            found=", ".join(sorted(names)[:8]),
            remedy="save each by itself: PEFT's save_pretrained(path, selected_adapters=[NAME])",
        )
