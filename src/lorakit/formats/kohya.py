"""kohya's sd-scripts names: one underscored key per module of a text encoder or language model.

`lora_te_model_layers_0_self_attn_q_proj.lora_down.weight` (r, in), `.lora_up.weight` (out, r) and
`.alpha`, a number; the scaling is alpha / r. The prefix is lora_te, lora_te1, lora_te2, ... and one
file may hold several: a prefix that is asked for leaves the others out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError
from lorakit.formats.foreign import (
    Conversion,
    Names,
    made_adapter,
    one_name_each,
    pairs_of,
    whole_updates,
)
from lorakit.formats.tensor_files import has_key, read_safetensors

_FILE = "lora.safetensors"
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_OWN_PREFIX = "lora_te"
_IMAGE = re.compile(r"lora_(?:unet|transformer)_")
_ENCODER = re.compile(r"lora_te\d*_")
_PREFIX = re.compile(r"lora_te\d*_|lora_|lycoris_")


class KohyaFormat:
    """One safetensors file."""

    name = "kohya"
    about = "kohya sd-scripts names, for a text encoder or language model"

    def recognises(self, path: Path) -> bool:
        """A safetensors file with lora_down in its keys, or a directory with one."""
        return has_key(path / _FILE if path.is_dir() else path, _DOWN)

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter; the base tells which underscores were dots.

        Raises:
            AdapterFileError: updates of an image model, names that mean no module or several, two
                names of one module, missing factors.

        Warns:
            LorakitWarning: updates under other prefixes than the one asked for are not read.
        """
        file = path / _FILE if path.is_dir() else path
        tensors = _asked_for(read_safetensors(file), given.prefix, file)
        pairs = pairs_of(tensors, (_DOWN, _UP), file)
        _refuse_image(pairs, given.prefix, file)
        _refuse_others(tensors, pairs, file)
        names = Names(given.model)
        own = _Underscored(names, given.model).require(list(pairs), given.prefix, file)
        factors: dict[str, Factors] = {}
        for key, (down, up) in pairs.items():
            module = own[key]
            scaling = _alpha(tensors, key, down.shape[0], file) / down.shape[0]
            if down.ndim == 4 and names.kind(module, file).name != "conv2d":
                down, up = down.flatten(1), up.flatten(1)
            factors[module] = names.factors(module, down, up, scaling=scaling, where=file)
        return made_adapter(factors, given, source=file, format_name=self.name)

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write lora.safetensors.

        Raises:
            RequestError: DoRA, embeddings, parameters trained beside, or a module whose underscored
                name is another module's too.
        """
        lead = _lead(_OWN_PREFIX if given.prefix is None else given.prefix)
        names = _Underscored(Names(given.model), given.model)
        tensors: dict[str, Tensor] = {}
        for update in whole_updates(adapter, "kohya's format", ("linear", "conv1d", "conv2d")):
            key = f"{lead}{names.key(update.module)}"
            tensors[f"{key}{_DOWN}"] = update.A.contiguous()
            tensors[f"{key}{_UP}"] = update.B.contiguous()
            tensors[f"{key}{_ALPHA}"] = torch.tensor(update.scaling * update.A.shape[0])
        metadata = {"format": "pt", "ss_network_module": "networks.lora"}
        save_file(tensors, str(path / _FILE), metadata=metadata)
        return path / _FILE


class _Underscored:
    """The base's modules under names in which every dot is an underscore.

    Args:
        names: the base's modules.
        model: the base.
    """

    def __init__(self, names: Names, model: nn.Module) -> None:
        self._names = names
        # transformers 5 left the module out that sd-scripts' names of CLIP begin with.
        is_clip = type(model).__name__.startswith("CLIPTextModel")
        is_bare = not any(module.startswith("text_model.") for module in names.modules)
        self._outer = "text_model_" if is_clip and is_bare else ""
        self._modules: dict[str, list[str]] = {}
        for module in names.modules:
            self._modules.setdefault(module.replace(".", "_"), []).append(module)

    def key(self, module: str) -> str:
        """A module's underscored name.

        Raises:
            RequestError: it is another module's too, so that nobody could read it back.
        """
        key = module.replace(".", "_")
        if len(self._modules[key]) > 1:
            raise RequestError(
                "kohya's format writes underscores for dots, which makes names of this base alike",
                where=module,
                found=", ".join(self._modules[key]),
                remedy="use a format that keeps the names: peft",
            )
        return f"{self._outer}{key}"

    def require(self, keys: list[str], prefix: str | None, file: Path) -> dict[str, str]:
        """Every key with the module it means.

        Raises:
            AdapterFileError: a key that means none or several; two keys of one module.
        """
        meant = {key: self._meant(_bare(key, prefix)) for key in keys}
        lost = [key for key, modules in meant.items() if not modules]
        if lost:
            raise AdapterFileError(
                "the file has updates of modules that the base does not have",
                where=str(file),
                found=", ".join(lost[:6]) + (" ..." if len(lost) > 6 else ""),
                remedy="is --base right? What stands before the module's name is --prefix, where "
                f"it is not {_OWN_PREFIX}, {_OWN_PREFIX}1, ...",
            )
        unclear = [key for key, modules in meant.items() if len(modules) > 1]
        if unclear:
            raise AdapterFileError(
                "a name may mean several modules of the base: underscores stand for dots",
                where=f"{file}: {unclear[0]}",
                found=", ".join(meant[unclear[0]]),
                remedy="convert it with the tool that wrote it, to a format that keeps the names",
            )
        found = {key: modules[0] for key, modules in meant.items()}
        encoders = "of several text encoders take one: --prefix lora_te1"
        one_name_each(found, file, remedy=encoders if prefix is None else None)
        return found

    def _meant(self, bare: str) -> list[str]:
        prefix, bare = self._names.prefix, bare.removeprefix(self._outer)
        for name in (bare, f"{prefix}_{bare}", bare.removeprefix(f"{prefix}_")):
            if name in self._modules:
                return self._modules[name]
        return []


def _lead(prefix: str) -> str:
    return f"{prefix}_" if prefix else ""


def _bare(key: str, prefix: str | None) -> str:
    return _PREFIX.sub("", key, count=1) if prefix is None else key.removeprefix(_lead(prefix))


def _asked_for(tensors: Mapping[str, Tensor], prefix: str | None, file: Path) -> dict[str, Tensor]:
    """The tensors under a prefix; all of them where none is asked for."""
    chosen = {k: t for k, t in tensors.items() if k.startswith(_lead(prefix or ""))}
    if not chosen:
        raise AdapterFileError(
            "no name in the file begins with the prefix that is asked for",
            where=str(file),
            expected=f"{_lead(prefix or '')}...",
            found=next(iter(tensors), "an empty file"),
            remedy="give the prefix as it stands there: --prefix NAME",
        )
    left = sum(key.endswith(_DOWN) for key in tensors if key not in chosen)
    if left:
        warnings.warn(
            f"{left} updates of other names than {_lead(prefix or '')}... are not read",
            LorakitWarning,
            stacklevel=5,
        )
    return chosen


def _refuse_image(pairs: Mapping[str, object], prefix: str | None, file: Path) -> None:
    image = [key for key in pairs if prefix is None and _IMAGE.match(key)]
    if image:
        encoders = sorted({m[0].rstrip("_") for key in pairs if (m := _ENCODER.match(key))})
        raise AdapterFileError(
            "the file adapts an image model; only language models are read here",
            where=f"{file}: {image[0]}",
            found=f"{len(image)} of {len(pairs)} updates",
            remedy=f"read a text encoder alone: {' or '.join(f'--prefix {e}' for e in encoders)}"
            if encoders
            else None,
        )


def _refuse_others(tensors: Mapping[str, Tensor], pairs: Mapping[str, object], file: Path) -> None:
    unknown = [key for key in tensors if not key.endswith((_DOWN, _UP, _ALPHA))]
    if unknown:
        raise AdapterFileError(
            "the file has tensors that are not plain LoRA",
            where=str(file),
            found=", ".join(unknown[:6]),
        )
    alone = [key for key in tensors if key.endswith(_ALPHA) and key[: -len(_ALPHA)] not in pairs]
    if alone:
        raise AdapterFileError(
            "the file has an alpha without its matrices",
            where=f"{file}: {alone[0]}",
            expected=f"{alone[0][: -len(_ALPHA)]}{_DOWN} and {_UP}",
            found=f"{len(alone)} of them",
            remedy="copy the file again: a part of it is missing",
        )


def _alpha(tensors: Mapping[str, Tensor], key: str, r: int, file: Path) -> float:
    """The update's alpha; its rank where the file names none, which is a scaling of 1."""
    alpha = tensors.get(f"{key}{_ALPHA}")
    if alpha is None:
        return float(r)
    if alpha.numel() != 1 or not bool(alpha.isfinite().all()):
        raise AdapterFileError(
            "an alpha that is no finite number",
            where=f"{file}: {key}{_ALPHA}",
            found=f"shape {tuple(alpha.shape)}",
        )
    return float(alpha)
