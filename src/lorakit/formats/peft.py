"""PEFT's file layout, both ways, with lorakit.json (the passport) beside it.

adapter_config.json, adapter_model.safetensors; keys are `base_model.model.` + the module's name +
`.lora_A.weight` (r, in), `.lora_B.weight` (out, r); embeddings `.lora_embedding_A` (r, vocabulary),
`.lora_embedding_B` (width, r); DoRA's `.lora_magnitude_vector` (out,), for a convolution
(1, out, 1, 1); trained biases `.base_layer.bias` on adapted modules; modules
trained beside under their plain names. Parts of a fused projection are written as one update of
the whole: A stacked, B zero-padded into a block matrix, rank and alpha multiplied; the magnitude
of rows that no part owns is the base's own norm, so that PEFT leaves them as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.attach import attach
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import AdapterFileError, LorakitWarning
from lorakit.files import atomic_directory, write_json
from lorakit.formats.passport import PASSPORT_NAME, SiteRecord, read_passport, write_passport
from lorakit.formats.peft_config import (
    CONFIG_NAME,
    config_for,
    peft_pattern,
    read_config,
    spec_from_config,
)
from lorakit.formats.peft_parameters import (
    TOKENS,
    parameter_factors,
    parameter_pairs,
    stored_parameters,
    token_rows,
)
from lorakit.formats.peft_parts import (
    FACTOR_DTYPES,
    parts_fit,
    split_parts,
    stack_magnitudes,
    stack_parts,
)
from lorakit.formats.peft_targets import beyond_targets
from lorakit.formats.peft_tensors import (
    PREFIX,
    TENSORS_NAME,
    Pairs,
    read_tensors,
    sort_tensors,
)


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    passport: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Adapter:
    """Write an attached adapter as PEFT does, plus its passport; whole or not at all.

    Args:
        model: the model it is attached to; not changed.
        path: a directory that does not exist yet, or is empty.
        name: the adapter.
        passport: what else is known of it: data, seed, tokenizer, metrics ...
        replace: write over an earlier adapter of that path.

    Returns:
        What was written.

    Raises:
        StateError: no adapter of that name is attached.
        OutputError: the directory is not empty, or the disk refuses.
    """
    adapter = adapter_from_model(model, name, passport=passport)
    write_adapter(adapter, Path(path), replace=replace)
    return adapter


def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, any_base: bool = False
) -> Adapter:
    """Read an adapter and bind it to the model, strict both ways; it is active afterwards.

    Args:
        model: the base it was made for; mutated, see `attach`.
        path: a directory in PEFT's layout.
        name: its name on this model.
        any_base: bind even if the passport names another base.

    Returns:
        What was read.

    Raises:
        AdapterFileError: files that cannot be read; tensors missing, extra, misshapen, not finite.
        BaseMismatchError: the passport names another base.
        StateError: the name is taken or cannot be one.
    """
    adapter, problems = _read(Path(path))
    bind_adapter(model, adapter, name, any_base=any_base, problems=problems)
    return adapter


def write_adapter(
    adapter: Adapter, path: Path, *, replace: bool = False, model_type: str | None = None
) -> None:
    """Write the adapter's directory; see `save_adapter`.

    Args:
        adapter: what is written.
        path: a directory that does not exist yet, or is empty.
        replace: write over an earlier adapter of that path.
        model_type: the base's, as transformers names it, where the passport does not say it.
    """
    tensors, stacked, parameters = _stored_tensors(adapter)
    config = config_for(adapter, stacked, parameters, model_type=model_type)
    with atomic_directory(path, replace=replace) as staging:
        save_file(tensors, str(staging / TENSORS_NAME), metadata={"format": "pt"})
        write_json(staging / CONFIG_NAME, dict(sorted(config.items())))
        write_passport(adapter, staging)


def changed_since_saved(adapter: Adapter, path: Path) -> list[str]:
    """Read a directory again: the tensors that are not, bit for bit, those of the adapter.

    Raises:
        AdapterFileError: it cannot be read.
    """
    read_adapter(path)
    expected = _stored_tensors(adapter)[0]
    found = read_tensors(path)
    names = expected.keys() | found.keys()
    return sorted(
        name
        for name in names
        if name not in expected
        or name not in found
        or expected[name].dtype != found[name].dtype
        or not torch.equal(expected[name].cpu(), found[name])
    )


_Sizes = dict[str, tuple[int, float]]


def _stored_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], _Sizes, _Sizes]:
    """The tensors of the file by name, and the rank and scaling of each module and parameter."""
    found, parameters = stored_parameters(adapter)
    tensors = {f"{PREFIX}{name}": value for name, value in found.items()}
    stacked: _Sizes = {}
    for module, sites in adapter.modules().items():
        if next(iter(sites.values())).stack is not None:
            continue
        A, B, scaling = stack_parts(list(sites.values()))
        stacked[module] = (A.shape[0], scaling)
        embedding = next(iter(sites.values())).kind == "embedding"
        for letter, value in (("A", A), ("B", B)):
            ending = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
            tensors[f"{PREFIX}{module}.{ending}"] = value
        if adapter.spec.update == "dora":
            whole = stack_magnitudes(list(sites.values()), adapter.base_norms.get(module))
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = whole
    for module, bias in adapter.biases.items():
        tensors[f"{PREFIX}{module}.base_layer.bias"] = bias
    for name, value in adapter.overrides.items():
        tensors[f"{PREFIX}{name}"] = value
    for module, tokens in adapter.tokens.items():
        tensors[f"{PREFIX}{module}{TOKENS}"] = tokens.rows
    ordered = {name: value.contiguous() for name, value in sorted(tensors.items())}
    return ordered, stacked, parameters


def read_adapter(path: Path) -> Adapter:
    """Read a directory in PEFT's layout, without a model.

    Raises:
        AdapterFileError: see `load_adapter`.
    """
    adapter, problems = _read(path)
    if problems:
        raise AdapterFileError(
            "the adapter's tensors do not fit together",
            where=str(path / TENSORS_NAME),
            found="\n".join(problems[:12]),
        )
    return adapter


def _read(path: Path) -> tuple[Adapter, list[str]]:
    """The adapter, and what is wrong with its tensors already without a model."""
    config = read_config(path)
    passport, records, own_spec = read_passport(path)
    # The file's own numbers count for what is computed, so they are checked in any case.
    stated = spec_from_config(config, path / CONFIG_NAME)
    spec = own_spec or stated
    tensors = read_tensors(path)
    found = sort_tensors(tensors, path)
    pairs = found.pairs
    factors, problems = _factors_of_file(config, spec, pairs, records)
    if not records:
        _note_beyond(config, [name for name, f in factors.items() if f.stack is None])
    tokens, wrong = token_rows(found.tokens, config)
    problems += wrong
    base_norms = {
        m: pair["magnitude"].flatten()
        for m, pair in pairs.items()
        if "magnitude" in pair and any(r.rows for r in records.get(m, []))
    }
    base_weights = {m: pair["base"] for m, pair in pairs.items() if "base" in pair}
    problems += [f"missing: {m}: targeted, no tensors" for m in records if m not in pairs]
    if not tensors:
        raise AdapterFileError("the adapter is empty", where=str(path / TENSORS_NAME))
    adapter = Adapter(
        spec=spec,
        factors=factors,
        biases=found.biases,
        overrides=found.overrides,
        tokens=tokens,
        passport=passport,
        base_norms=base_norms,
        base_weights=base_weights,
        target_modules=_targeted(config),
        config=config,
    )
    return adapter, problems


def _note_beyond(config: Mapping[str, Any], modules: list[str]) -> None:
    beyond = beyond_targets(config, modules)
    if beyond:
        warnings.warn(
            f"the file has updates that its configuration does not target ({len(beyond)}, first "
            f"{beyond[0]}): they are used here, and PEFT passes them over",
            LorakitWarning,
            stacklevel=4,
        )


def _factors_of_file(
    config: Mapping[str, Any],
    spec: LoraSpec,
    pairs: Pairs,
    records: Mapping[str, list[SiteRecord]],
) -> tuple[dict[str, Factors], list[str]]:
    """Site -> its update, and what is wrong."""
    factors: dict[str, Factors] = {}
    parameters, problems = parameter_pairs(pairs, config)
    for module, pair in _in_order(pairs, records):
        if set(pair) & {"A", "B"} != {"A", "B"}:
            lacking = "B" if "A" in pair else "A"
            problems.append(f"missing: {module}: lora_{lacking}")
            continue
        name = parameters.get(module, module)
        sizes = _sizes(config, name)
        if module in parameters and module not in records:
            found = parameter_factors(name, pair, spec, sizes=sizes, config=config)
        else:
            # Also a layer that is written as a parameter, for PEFT alone.
            found = _module_factors(
                config, spec, module, pair, records.get(module, []), sizes=sizes
            )
        if isinstance(found, str):
            problems.append(found)
        else:
            factors.update(found)
    return factors, problems


def _module_factors(
    config: Mapping[str, Any],
    spec: LoraSpec,
    module: str,
    pair: Mapping[str, Tensor],
    records: list[SiteRecord],
    *,
    sizes: tuple[int, float],
) -> dict[str, Factors] | str:
    whole = _whole_factors(config, spec, module, pair, sizes)
    if isinstance(whole, str):
        return whole
    if not parts_fit(records, whole):
        return f"misshapen: {module}: not the parts that the passport names"
    return split_parts(whole, records, spec.scaling)


def _in_order(
    pairs: Pairs, records: Mapping[str, list[SiteRecord]]
) -> list[tuple[str, dict[str, Tensor]]]:
    """The model's order where the passport tells it, else the file's with numbers as numbers."""
    known = {module: i for i, module in enumerate(records)}

    def place(item: tuple[str, dict[str, Tensor]]) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in item[0].split(".")]
        return known.get(item[0], len(known)), parts

    return sorted(pairs.items(), key=place)


def _whole_factors(
    config: Mapping[str, Any],
    spec: LoraSpec,
    module: str,
    pair: Mapping[str, Tensor],
    sizes: tuple[int, float],
) -> Factors | str:
    """One module's update as the file has it, or what is wrong with it."""
    A, B = pair["A"], pair["B"]
    if not A.numel() or not B.numel():
        return (
            f"misshapen: {module}: A {tuple(A.shape)}, B {tuple(B.shape)} hold no numbers (saved "
            "without gathering the parts of a ZeRO-3 or FSDP run?)"
        )
    r, alpha = sizes
    if A.ndim < 2 or A.shape[0] != r or B.ndim < 2 or B.shape[1] != r:
        return f"misshapen: {module}: rank {r}, but A {tuple(A.shape)}, B {tuple(B.shape)}"
    if "embedding" in pair:
        kind = "embedding"
    elif A.ndim == 4:
        kind = "conv2d"
    else:
        kind = "conv1d" if config.get("fan_in_fan_out") else "linear"
    scaling = spec.scale(r=r, alpha=alpha)
    magnitude = pair.get("magnitude")
    if not all(value.dtype in FACTOR_DTYPES for value in pair.values()):
        dtypes = ", ".join(str(value.dtype).removeprefix("torch.") for value in pair.values())
        return f"misshapen: {module}: {dtypes}, not float32, float16 or bfloat16"
    if (magnitude is not None) != (spec.update == "dora"):
        return (
            f"missing: {module}: lora_magnitude_vector, and the configuration says use_dora"
            if magnitude is None
            else f"extra: {module}: lora_magnitude_vector, and the configuration has no use_dora"
        )
    return Factors(
        A=A,
        B=B,
        alpha=alpha,
        scaling=scaling,
        kind=kind,
        module=module,
        magnitude=None if magnitude is None else magnitude.flatten(),
    )


def _sizes(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and alpha of a module or parameter, by PEFT's patterns."""
    r = peft_pattern(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = peft_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    return r, float(alpha)


def _targeted(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the configuration says is adapted, where it says so without further filters."""
    if any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return ()
    targets = config.get("target_modules") or ()
    if targets == "all-linear":
        return ()
    return (targets,) if isinstance(targets, str) else tuple(targets)


# `attach` is public from here, so that a model that carries adapters can always be saved.
__all__ = [
    "PASSPORT_NAME",
    "attach",
    "load_adapter",
    "read_adapter",
    "read_tensors",
    "save_adapter",
    "write_adapter",
]
