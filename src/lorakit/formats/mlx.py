"""mlx-lm's adapters: adapters.safetensors and adapter_config.json, factors transposed.

`lora_a` (in, r) and `lora_b` (r, out) with y = scale (x lora_a) lora_b; for an embedding `lora_a`
(vocabulary, r), `lora_b` (r, width); DoRA's `m` (out,). One rank and one scale for the whole file;
`keys` name modules inside a block, or whole paths outside of the blocks. Names are transformers',
but for the models that mlx-lm arranges otherwise.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.errors import AdapterFileError, RequestError
from lorakit.files import read_json, write_json
from lorakit.formats.foreign import (
    Conversion,
    Names,
    WholeUpdate,
    commonest_scaling,
    made_adapter,
    one_name_each,
    pairs_of,
    refuse_beside,
    refuse_tied,
    whole_updates,
)
from lorakit.formats.peft_parts import stack_magnitudes, stack_parts
from lorakit.formats.tensor_files import first_line, read_safetensors, widened

# mlx-lm wrote NumPy's format before.
MLX_TENSORS = ("adapters.safetensors", "adapters.npz")
_TENSORS, _OLD_TENSORS = MLX_TENSORS
_CONFIG = "adapter_config.json"
_IN_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks|block)\.\d+\.(?P<inside>.+)")

# Beginnings of names: transformers', mlx-lm's.
_RENAMED = {
    "gpt2": (("transformer.", "model."),),
    "gpt_bigcode": (("transformer.", "model."),),
    "gptj": (("transformer.", "model."),),
    "gpt_neox": (
        ("gpt_neox.layers.", "model.h."),
        ("lm_head", "model.embed_out"),
        ("gpt_neox.", "model."),
    ),
    "gemma3": (
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
    ),
}


class MlxFormat:
    """A directory with adapters.safetensors and adapter_config.json."""

    name = "mlx"
    about = "mlx-lm's adapter directory"

    def recognises(self, path: Path) -> bool:
        """A directory with adapters.safetensors, or with the older adapters.npz."""
        return any((path / name).is_file() for name in MLX_TENSORS)

    def read(self, path: Path, given: Conversion) -> Adapter:
        """Read an adapter.

        Raises:
            AdapterFileError: no scale in the configuration, unknown names or tensors.
        """
        config = _read_config(path / _CONFIG)
        file = path / (_TENSORS if (path / _TENSORS).is_file() else _OLD_TENSORS)
        tensors = read_safetensors(file) if file.name == _TENSORS else _read_npz(file)
        pairs = pairs_of(tensors, (".lora_a", ".lora_b"), file)
        magnitudes = {k.removesuffix(".m"): v for k, v in tensors.items() if k.endswith(".m")}
        unknown = [k for k in tensors if not k.endswith((".lora_a", ".lora_b", ".m"))]
        dora = config.get("fine_tune_type") == "dora"
        if unknown or set(magnitudes) != (set(pairs) if dora else set()):
            raise AdapterFileError(
                "the file has tensors that are not low-rank updates, or lacks magnitudes",
                where=str(file),
                expected="lora_a and lora_b" + (" and m of every update" if dora else ""),
                found=", ".join(unknown[:6]) or f"{len(magnitudes)} of {len(pairs)} magnitudes",
            )
        scale = _scale(config, given, path / _CONFIG)
        names = Names(given.model)
        here = {key: _own_name(key, given) for key in pairs}
        found = names.require(list(dict.fromkeys(here.values())), file)
        own = {key: found[name] for key, name in here.items()}
        one_name_each(own, file)
        factors: dict[str, Factors] = {}
        for key, (a, b) in pairs.items():
            if a.ndim != 2 or b.ndim != 2:
                raise AdapterFileError(
                    "updates of expert weights are not read from this format",
                    where=f"{file}: {key}",
                    found=f"lora_a {tuple(a.shape)}",
                )
            made = names.factors(own[key], a.T, b.T, scaling=scale, where=path)
            factors[own[key]] = _with_magnitude(made, magnitudes.get(key))
        adapter = made_adapter(factors, given, source=path, format_name=self.name)
        refuse_tied(adapter, given, "mlx-lm")
        return _as_dora(adapter) if dora else adapter

    def write(self, adapter: Adapter, path: Path, given: Conversion) -> Path:
        """Write the directory; lower ranks are padded with zeros, scalings folded into lora_b.

        Raises:
            RequestError: biases or modules trained beside, a convolution, DoRA on parts, a tied
                embedding.
        """
        refuse_tied(adapter, given, "mlx-lm")
        dora = adapter.spec.update == "dora"
        updates = _dora_updates(adapter) if dora else _lora_updates(adapter)
        scale = commonest_scaling(updates)
        # For DoRA too: the norm of W0 + s B A does not depend on how s is split.
        rank = max(update.A.shape[0] for update in updates)
        tensors: dict[str, Tensor] = {}
        for update in updates:
            missing = rank - update.A.shape[0]
            name = _mlx_name(update.module, given)
            tensors[f"{name}.lora_a"] = F.pad(update.A, (0, 0, 0, missing)).T.contiguous()
            tensors[f"{name}.lora_b"] = F.pad(update.at(scale), (0, missing)).T.contiguous()
            if dora:
                tensors[f"{name}.m"] = stack_magnitudes(
                    list(adapter.modules()[update.module].values()),
                    adapter.base_norms.get(update.module),
                ).contiguous()
        save_file(tensors, str(path / _TENSORS), metadata={"format": "mlx"})
        parameters = {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.spec.dropout,
            "keys": sorted({_key(_mlx_name(update.module, given)) for update in updates}),
        }
        config = {
            "fine_tune_type": "dora" if dora else "lora",
            "model": given.base,
            "num_layers": -1,
            "lora_parameters": parameters,
        }
        write_json(path / _CONFIG, config)
        return path


def _read_npz(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: widened(torch.from_numpy(arrays[key])) for key in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise AdapterFileError(
            "the adapter's tensors cannot be read",
            where=str(file),
            found=first_line(error),
            remedy="copy the file again",
        ) from error


def _renamed(given: Conversion) -> tuple[tuple[str, str], ...]:
    config = getattr(given.model, "config", None)
    return _RENAMED.get(str(getattr(config, "model_type", "")), ())


def _mlx_name(module: str, given: Conversion) -> str:
    """A module's name in mlx-lm's model."""
    for here, there in _renamed(given):
        if module.startswith(here):
            return there + module.removeprefix(here)
    return module


def _own_name(name: str, given: Conversion) -> str:
    """The inverse of `_mlx_name`."""
    for here, there in _renamed(given):
        if name.startswith(there):
            return here + name.removeprefix(there)
    return name


def _key(module: str) -> str:
    found = _IN_BLOCK.fullmatch(module)
    return found["inside"] if found else module


def _lora_updates(adapter: Adapter) -> list[WholeUpdate]:
    return whole_updates(adapter, "mlx-lm", ("linear", "conv1d", "embedding"))


def _dora_updates(adapter: Adapter) -> list[WholeUpdate]:
    refuse_beside(adapter, "mlx-lm")
    updates: list[WholeUpdate] = []
    for module, sites in adapter.modules().items():
        parts = list(sites.values())
        if parts[0].kind not in ("linear", "conv1d"):
            # mlx-lm measures an embedding per token, PEFT per dimension.
            raise RequestError(
                "mlx-lm's DoRA is another one here: only linear layers agree",
                where=module,
                found=parts[0].kind,
            )
        A, B, scaling = stack_parts(parts)
        updates.append(WholeUpdate(module, parts[0].kind, A, B, scaling))
    return updates


def _with_magnitude(factors: Factors, magnitude: Tensor | None) -> Factors:
    if magnitude is None:
        return factors
    return Factors(
        A=factors.A,
        B=factors.B,
        alpha=factors.alpha,
        scaling=factors.scaling,
        kind=factors.kind,
        module=factors.module,
        magnitude=magnitude,
    )


def _as_dora(adapter: Adapter) -> Adapter:
    wrong = [n for n, f in adapter.factors.items() if f.kind not in ("linear", "conv1d")]
    if wrong:
        raise AdapterFileError(
            "mlx-lm's DoRA is another one here: only linear layers agree", where=wrong[0]
        )
    spec = adapter.spec.from_dict({**adapter.spec.to_dict(), "update": "dora"})
    return Adapter(
        spec=spec, factors=adapter.factors, passport=adapter.passport, config=adapter.config
    )


def _scale(config: Mapping[str, Any], given: Conversion, where: Path) -> float:
    """The multiplier of the file.

    Configurations of the years of `lora_layers` have an alpha beside the scale. mlx-lm multiplied
    scale by alpha / rank then; today it reads the scale alone, and so it is for `num_layers`.

    Raises:
        RequestError: which of the two it was cannot be told, and is not given.
    """
    parameters = config["lora_parameters"]
    scale, rank, alpha = (parameters.get(key) for key in ("scale", "rank", "alpha"))
    numbers = all(isinstance(value, int | float) for value in (rank, alpha))
    if given.alpha is not None and numbers and rank:
        return given.alpha / rank
    if "lora_layers" in config and numbers and alpha != rank:
        raise RequestError(
            "mlx-lm of the time of this file multiplied by scale alpha / rank, and today's "
            "multiplies by scale: which one trained it cannot be told",
            where=str(where),
            found=f"scale {scale}, alpha {alpha}, rank {rank}",
            remedy=f"--alpha {scale * alpha:g} (as it was then), or --alpha {scale * rank:g}",
        )
    return float(scale)


def _read_config(file: Path) -> Mapping[str, Any]:
    expected = '"lora_parameters" with a "scale", and fine_tune_type lora or dora'
    try:
        config = read_json(file)
        float(config["lora_parameters"]["scale"])
        if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
            raise ValueError(f"fine_tune_type {config['fine_tune_type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(
            "the configuration of the mlx-lm adapter cannot be used",
            where=str(file),
            expected=expected,
            found=f"{type(error).__name__}: {error}",
        ) from error
    return config
