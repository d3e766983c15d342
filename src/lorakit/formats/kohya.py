"""kohya's sd-scripts names: one underscored key per module of a text encoder or language model.

`lora_te_model_layers_0_self_attn_q_proj.lora_down.weight` (r, in), `.lora_up.weight` (out, r) and
`.alpha`, a number; the scaling is alpha / r. The prefix is lora_te, lora_te1, lora_te2, ...
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.errors import AdapterFileError
from lorakit.formats.foreign import (
    Conversion,
    Names,
    made_adapter,
    pairs_of,
    read_safetensors,
    whole_updates,
)

_FILE = "lora.safetensors"
_DOWN, _UP = ".lora_down.weight", ".lora_up.weight"
_IMAGE = re.compile(r"lora_(?:unet|transformer)_")
_PREFIX = re.compile(r"lora_te\d*_|lora_|lycoris_")


class KohyaFormat:
    """One safetensors file."""

    name = "kohya"
    about = "kohya sd-scripts names, for a text encoder or language model"

    def recognises(self, path: Path) -> bool:
        """A safetensors file with lora_down in its keys."""
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        try:
            with safe_open(str(path), framework="pt") as tensors:
                return any(key.endswith(_DOWN) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return False

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter; the base tells which underscores were dots.

        Raises:
            AdapterFileError: updates of an image model, unknown names, missing factors.
        """
        file = path / _FILE if path.is_dir() else path
        tensors = read_safetensors(file)
        pairs = pairs_of(tensors, (_DOWN, _UP), file)
        image = [key for key in pairs if _IMAGE.match(key)]
        if image:
            raise AdapterFileError(
                "the file adapts an image model; only language models are read here",
                where=f"{file}: {image[0]}",
                found=f"{len(image)} of {len(pairs)} updates",
            )
        unknown = [key for key in tensors if not key.endswith((_DOWN, _UP, ".alpha"))]
        if unknown:
            raise AdapterFileError(
                "the file has tensors that are not plain LoRA",
                where=str(file),
                found=", ".join(unknown[:6]),
            )
        names = Names(given.model)
        dotted = {module.replace(".", "_"): module for module in names.modules}
        factors: dict[str, Factors] = {}
        for key, (down, up) in pairs.items():
            bare = _PREFIX.sub("", key, count=1)
            module = dotted.get(bare) or dotted.get(f"{names.prefix}_{bare}")
            module = module or dotted.get(bare.removeprefix(f"{names.prefix}_"))
            if module is None:
                names.require([key], file)
                continue
            alpha = tensors.get(f"{key}.alpha")
            if alpha is not None and (alpha.numel() != 1 or not bool(alpha.isfinite().all())):
                raise AdapterFileError(
                    "an alpha that is no finite number",
                    where=f"{file}: {key}.alpha",
                    found=f"shape {tuple(alpha.shape)}",
                )
            scaling = 1.0 if alpha is None else float(alpha) / down.shape[0]
            if down.ndim == 4 and names.kind(module, file).name != "conv2d":
                down, up = down.flatten(1), up.flatten(1)
            factors[module] = names.factors(module, down, up, scaling=scaling, where=file)
        return made_adapter(factors, given, source=file, format_name=self.name)

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write lora.safetensors.

        Raises:
            RequestError: DoRA, embeddings, or parameters trained beside.
        """
        tensors: dict[str, Tensor] = {}
        for update in whole_updates(adapter, "kohya's format", ("linear", "conv1d", "conv2d")):
            key = f"{given.prefix}_{update.module.replace('.', '_')}"
            tensors[f"{key}{_DOWN}"] = update.A.contiguous()
            tensors[f"{key}{_UP}"] = update.B.contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(update.scaling * update.A.shape[0])
        metadata = {"format": "pt", "ss_network_module": "networks.lora"}
        save_file(tensors, str(path / _FILE), metadata=metadata)
        return path / _FILE
