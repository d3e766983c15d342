"""llama.cpp and mlx-lm: formats of their own, written by the converter and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.bind import plan_binding
from lorakit.converting import write_as
from lorakit.errors import ModelError
from lorakit.formats.foreign import Conversion, WholeUpdate, common_alpha, commonest_scaling
from lorakit.formats.peft_parts import stack_parts
from lorakit.models.empty import empty_model
from lorakit.models.named import NAMED_MODELS, find_named

ConvertedEngine = Literal["llama.cpp", "mlx"]
FORMATS: Mapping[ConvertedEngine, str] = {"llama.cpp": "gguf", "mlx": "mlx"}


def write_converted(
    adapter: Adapter, output: Path, engine: ConvertedEngine, base: str
) -> tuple[Path, list[str]]:
    """Write an adapter in an engine's own format; whole or not at all.

    Args:
        adapter: as it is on disk.
        output: a directory that does not exist yet, or is empty.
        engine: who is to load it.
        base: the base as the engine finds it; only its configuration is read, and where it cannot
            be had here, that of the base which the adapter names.

    Returns:
        What the engine is given, and what was written in another form.

    Raises:
        AdapterFileError: it does not fit the base.
        RequestError: the format cannot hold it, or the base's architecture is not known there.
        WorkError: what was written does not read back as it was meant.
    """
    given = Conversion(model=_structure(adapter, base), base=base)
    bound = plan_binding(given.model, adapter)
    written, _ = write_as(bound, output, FORMATS[engine], given)
    return written, _changes(bound, engine)


def _structure(adapter: Adapter, base: str) -> PreTrainedModel:
    try:
        return empty_model(base)
    except ModelError:
        own = adapter.config.get("base_model_name_or_path")
        if not isinstance(own, str) or not own or own == base:
            raise
        return empty_model(own)


def gguf_of(base: str) -> str:
    """The GGUF file of a base that has one, else the base as it was named."""
    if base in NAMED_MODELS and not Path(base).exists():
        return str(find_named(base))
    return str(Path(base).resolve()) if Path(base).is_file() else base


def _changes(adapter: Adapter, engine: ConvertedEngine) -> list[str]:
    """What is written otherwise; the change of every weight stays what it was."""
    updates: list[WholeUpdate] = []
    for module, parts in adapter.modules().items():
        A, B, scaling = stack_parts(list(parts.values()))
        updates.append(WholeUpdate(module, next(iter(parts.values())).kind, A, B, scaling))
    ranks = [update.A.shape[0] for update in updates]
    changes: list[str] = []
    if any(factors.rows is not None for factors in adapter.factors.values()):
        changes.append("parts of fused projections written as one update of the whole")
    if engine == "mlx":
        if len(set(ranks)) > 1:
            shown = ", ".join(map(str, sorted(set(ranks))))
            changes.append(f"ranks {shown} padded with zeros to {max(ranks)}")
        scale = commonest_scaling(updates)
        folded = [update.module for update in updates if update.scaling != scale]
        stated = f"scale {scale:g}"
    else:
        alpha = common_alpha([update.scaling for update in updates], ranks)
        folded = [u.module for u in updates if u.scaling != alpha / u.A.shape[0]]
        stated = f"alpha {alpha:g}"
    if adapter.spec.scaling != "alpha/r":
        changes.append(f"rsLoRA's scaling alpha/sqrt(r) stated as {stated}")
    if folded:
        many = f"{len(folded)} of {len(updates)} modules"
        changes.append(f"the scaling of {many} moved into B: the file has one {stated}")
    return changes
