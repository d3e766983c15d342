"""Which tensors of a checkpoint change, decided from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.parameters import stacked_parameters, token_modules
from lorakit.adapters.targets import base_modules
from lorakit.errors import ModelError
from lorakit.models.checkpoint import unreadable, weight_files
from lorakit.models.empty import empty_model

_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor to write.

    Attributes:
        parameter: the parameter's name in the model.
        source: the tensor in the checkpoint whose values it starts from.
        target: the name it is written under; another than `source` when a tie is undone.
        module: the adapted module whose delta is added, or None.
        override: the name of the replacing tensor in the adapter, or None.
        tokens: the module whose rows of tokens are replaced, or None.
    """

    parameter: str
    source: str
    target: str
    module: str | None = None
    override: str | None = None
    tokens: str | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that will be written.

    Attributes:
        directory: the base checkpoint.
        files: its weight files, in order.
        location: tensor name -> file name.
        changes: source tensor -> what becomes of it.
        untied: whether the configuration must say that nothing is tied.
        adapter: the adapter, its kinds as the model has them.
    """

    directory: Path
    files: tuple[Path, ...]
    location: Mapping[str, str]
    changes: Mapping[str, tuple[TensorChange, ...]]
    untied: bool
    adapter: Adapter


def plan_merge(directory: Path, adapter: Adapter) -> MergePlan | None:
    """Resolve every change against the checkpoint's headers; reads no weights.

    Args:
        directory: a model directory with safetensors.
        adapter: what to merge.

    Returns:
        The plan, or None when the checkpoint's tensor names are not the model's own (transformers
        renames some on load, and stacks experts): then only the loaded model can be merged.

    Raises:
        AdapterFileError: the adapter does not bind to this architecture.
        ModelError: the checkpoint is missing, unreadable, or quantized.
    """
    model = empty_model(directory)
    bound = plan_binding(model, adapter)
    modules = base_modules(model)
    adapted = bound.modules().keys()
    if stacked_parameters(bound) or token_modules(modules, bound).keys() & adapted:
        return None
    location, dtypes = _headers(directory)
    prefix = str(model.base_model_prefix)
    rows = {f"{name}.weight": tokens for name, tokens in token_modules(modules, bound).items()}
    wanted = _wanted(bound, rows)
    groups = _ties(modules)
    changes: dict[str, list[TensorChange]] = {}
    untied = False
    for parameter in _with_siblings(wanted, groups):
        group = groups.get(parameter, (parameter,))
        stored = _stored_name(parameter, location, prefix)
        source = stored or next(
            (s for p in group if (s := _stored_name(p, location, prefix)) is not None), None
        )
        if source is None:
            return None
        if dtypes[source] not in _FLOATS:
            raise ModelError(
                "the base checkpoint is quantized: there is no dense weight to add to",
                where=f"{location[source]}: {source}",
                expected=", ".join(sorted(_FLOATS)),
                found=dtypes[source],
                remedy="merge into the dense checkpoint of the same model, or into these weights "
                "multiplied out: --onto nf4-dequantized",
            )
        stays_tied = parameter in rows and len({rows.get(name) for name in group}) == 1
        if stays_tied and any(change.target == source for change in changes.get(source, [])):
            continue  # one tensor for all of them, as before
        untied = untied or (len(group) > 1 and not stays_tied)
        module, override, tokens = wanted.get(parameter, (None, None, None))
        target = source if stays_tied else stored or parameter
        change = TensorChange(parameter, source, target, module, override, tokens)
        changes.setdefault(source, []).append(change)
    return MergePlan(
        directory=directory,
        files=tuple(weight_files(directory)),
        location=location,
        changes={source: tuple(group) for source, group in changes.items()},
        untied=untied,
        adapter=replace(bound, tokens=token_modules(modules, bound)),
    )


def stored_names(
    directory: Path, model: PreTrainedModel, parameters: Sequence[str]
) -> list[str] | None:
    """The names that parameters have in the checkpoint; None where one is under no name of its own.

    Args:
        directory: the checkpoint.
        model: its architecture; on the meta device is enough.
        parameters: names in the model.
    """
    location, _ = _headers(directory)
    prefix = str(model.base_model_prefix)
    names = [_stored_name(parameter, location, prefix) for parameter in parameters]
    found = [name for name in names if name is not None]
    return found if len(found) == len(names) else None


_Wanted = tuple[str | None, str | None, str | None]


def _wanted(adapter: Adapter, rows: Mapping[str, object]) -> dict[str, _Wanted]:
    """Parameter -> (adapted module, replacing tensor, module with new rows of tokens)."""
    wanted: dict[str, _Wanted] = {
        f"{module}.weight": (module, None, None) for module in adapter.modules()
    }
    wanted.update({f"{module}.bias": (None, f"{module}.bias", None) for module in adapter.biases})
    wanted.update({name: (None, name, None) for name in adapter.overrides})
    wanted.update({name: (None, None, name.removesuffix(".weight")) for name in rows})
    return wanted


def _ties(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Parameter -> all names it has, for those that have several."""
    names: dict[int, list[str]] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{module_name}.{name}")
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def _with_siblings(
    wanted: Mapping[str, object], groups: Mapping[str, Sequence[str]]
) -> dict[str, None]:
    """The changed parameters, and those that were tied to one and must now be written too."""
    result: dict[str, None] = {}
    for parameter in wanted:
        result.update(dict.fromkeys(groups.get(parameter, (parameter,))))
    return result


def _stored_name(parameter: str, location: Mapping[str, str], prefix: str) -> str | None:
    for name in (parameter, parameter.removeprefix(f"{prefix}."), f"{prefix}.{parameter}"):
        if name in location:
            return name
    return None


def _headers(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    location: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for file in weight_files(directory):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    location[name] = file.name
                    dtypes[name] = tensors.get_slice(name).get_dtype()
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
    return location, dtypes


def updated_config(directory: Path, *, untied: bool) -> dict[str, object]:
    """The base's config.json as the merged model needs it."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if untied:
        config["tie_word_embeddings"] = False
        for section in config.values():
            if isinstance(section, dict) and "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    return config


def changed_blocks(
    change: TensorChange, base: Tensor, adapter: Adapter
) -> Callable[[slice], tuple[Tensor, Tensor]]:
    """`changed_value` for blocks of the tensor's first axis, as they are asked for.

    LoRA's change is multiplied out block by block; all others are computed whole, here.
    """
    parts = adapter.modules()[change.module].values() if change.module is not None else ()
    if not parts or any(part.magnitude is not None for part in parts):
        whole = [torch.atleast_1d(value) for value in changed_value(change, base, adapter)]
        return lambda block: (whole[0][block], whole[1][block])
    dtype = torch.promote_types(base.dtype, torch.float32)
    updates = [part.values() for part in parts]

    def block_of(block: slice) -> tuple[Tensor, Tensor]:
        delta = updates[0].delta_block(block)
        for update in updates[1:]:
            delta += update.delta_block(block)
        delta = delta.to(dtype)
        return delta, base[block] + delta

    return block_of


def changed_value(change: TensorChange, base: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(the wanted change, the wanted value), both float32 or wider.

    Args:
        change: what becomes of the tensor.
        base: the stored tensor.
        adapter: where the change comes from.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    if change.module is not None:
        delta = adapter.delta(change.module, wide).to(wide.dtype)
        return delta, wide + delta
    if change.override is not None:
        module = change.override.removesuffix(".bias")
        value = adapter.overrides.get(change.override, adapter.biases.get(module))
        if value is None:
            raise KeyError(change.override)
        return value.to(wide.dtype) - wide, value.to(wide.dtype)
    if change.tokens is not None:
        value = adapter.tokens[change.tokens].on(wide)
        return value - wide, value
    return torch.zeros_like(wide), wide
