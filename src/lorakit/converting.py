"""Convert adapters between the formats of several tools; what was written is read back first."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.parameters import stacked_parameters
from lorakit.adapters.targets import model_type_of
from lorakit.errors import AdapterFileError, LorakitWarning, RequestError, WorkError
from lorakit.files import atomic_directory, require_free
from lorakit.formats.compared import differences
from lorakit.formats.foreign import Conversion
from lorakit.formats.loralib import LoralibFormat, alpha_written
from lorakit.formats.loralib_beside import classifying_head
from lorakit.formats.peft import read_adapter, write_adapter
from lorakit.formats.peft_config import CONFIG_NAME
from lorakit.formats.peft_expert_stacks import one_by_one
from lorakit.formats.peft_experts import convert_experts, has_experts
from lorakit.formats.peft_tensors import read_tensors, sort_tensors
from lorakit.formats.registry import EXPERT_LAYOUTS, FOREIGN, PEFT, format_of, require_format
from lorakit.models.empty import empty_classifier, empty_model
from lorakit.models.task_head import ClassificationHead

# Folding a scaling into float32 factors rounds once; nothing else may change.
_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What the files do not say.

    Attributes:
        source_format: None to look at the path.
        alpha: the numerator of the scaling, where the format has none: of a loralib file, read or
            to be written, and of an old one of mlx-lm.
        parts: adapted parts of fused projections, in order (loralib).
        prefix: before every name (kohya); None writes lora_te and reads any of sd-scripts'.
    """

    source_format: str | None = None
    alpha: float | None = None
    parts: tuple[str, ...] = ()
    prefix: str | None = None


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    base: str | None = None,
    options: ConvertOptions | None = None,
) -> dict[str, Any]:
    """Convert an adapter; the result is read back and compared before it takes its name.

    Args:
        source: a directory or file of any format.
        output: a directory that does not exist, or is empty.
        to: peft, mlx, gguf, kohya, loralib; peft-0.18 and peft-0.19 for PEFT's layouts of stacked
            expert weights.
        base: the base model; None for the one the source names. Only its configuration is read.
        options: what the files do not say.

    Returns:
        Plain values: formats, the file to use, and the largest relative error of a change.

    Raises:
        RequestError: no such format; something is missing; what the format cannot hold.
        AdapterFileError: the source cannot be read or does not fit the base.
        WorkError: the result does not read back as what was written.
        OutputError: the output is taken.

    Warns:
        LorakitWarning: an option that neither format asks for.
    """
    source, output = Path(source), Path(output)
    options = options or ConvertOptions()
    require_format(to)
    require_free(output)
    source_format = require_format(options.source_format or format_of(source))
    _check_options(options, source_format, to)
    if to in EXPERT_LAYOUTS:
        return _convert_experts(source, output, to, base)
    ref = base or _named_base(source, source_format)
    given = Conversion(
        model=_base_model(source, source_format, ref),
        base=ref,
        alpha=options.alpha,
        parts=options.parts,
        prefix=options.prefix,
    )
    adapter = _read(source, source_format, given)
    if stacked_parameters(adapter):
        raise RequestError(
            "this adapter changes stacked expert weights, which only PEFT's own layouts hold",
            where=str(source),
            expected=f"--to {' or '.join(EXPERT_LAYOUTS)}",
        )
    written, error = write_as(adapter, output, to, given)
    return {
        "from": source_format,
        "to": to,
        "base": ref,
        "output": str(written),
        "num_updates": len(adapter.factors),
        "num_params": adapter.num_params(),
        "max_relative_error": error,
        "alpha": alpha_written(
            adapter, given if to == LoralibFormat.name else replace(given, alpha=None)
        ),
    }


def write_as(adapter: Adapter, output: Path, to: str, given: Conversion) -> tuple[Path, float]:
    """Write an adapter in a format; it takes its name when it was read back and compared.

    Args:
        adapter: bound to `given.model`.
        output: a directory that does not exist, or is empty.
        to: peft or one of `FOREIGN`.
        given: the base.

    Returns:
        What the other tool loads, and the largest relative error of a change.

    Raises:
        RequestError: what the format cannot hold.
        WorkError: the result does not read back as what was written.
        OutputError: the output is taken.
    """
    with atomic_directory(output) as staging:
        written = _write(adapter, staging, to, given)
        error = _prove(adapter, written, to, given)
        name = written.name if written != staging else ""
    return output / name, error


def _check_options(options: ConvertOptions, source_format: str, to: str) -> None:
    """Refuse an alpha that cannot be, and say which options neither format asks for."""
    if options.alpha is not None and not 0 < options.alpha < math.inf:
        raise RequestError(
            "alpha must be a positive number",
            where="--alpha",
            expected="alpha > 0",
            found=str(options.alpha),
        )
    alpha_asked = to == "loralib" or source_format in ("loralib", "mlx")
    unread = {
        "--alpha, which is for loralib's files and old ones of mlx-lm": options.alpha is not None
        and not alpha_asked,
        "--parts, which is for loralib files that are read": bool(options.parts)
        and source_format != "loralib",
        "--prefix, which is for kohya's names": options.prefix is not None
        and "kohya" not in (source_format, to),
    }
    for what, is_unread in unread.items():
        if is_unread:
            warnings.warn(
                f"nobody reads {what}: from {source_format} to {to}",
                LorakitWarning,
                stacklevel=3,
            )


def _read(source: Path, name: str, given: Conversion) -> Adapter:
    if name == PEFT or name in EXPERT_LAYOUTS:
        _refuse_one_by_one(source, given)
        return plan_binding(given.model, read_adapter(source))
    return plan_binding(given.model, FOREIGN[name].read(source, given))


def _refuse_one_by_one(source: Path, given: Conversion) -> None:
    single = one_by_one(list(read_tensors(source)), given.model)
    if single:
        raise AdapterFileError(
            "the adapter is on experts one by one, and the base holds them stacked",
            where=str(source),
            found=f"{single[0]} and {len(single) - 1} more",
            remedy="stack them in PEFT's layout: --to peft-0.19",
        )


def _write(adapter: Adapter, staging: Path, to: str, given: Conversion) -> Path:
    if to == PEFT:
        inside = staging / "peft"
        write_adapter(adapter, inside, model_type=model_type_of(given.model))
        for file in inside.iterdir():
            file.rename(staging / file.name)
        inside.rmdir()
        return staging
    return FOREIGN[to].write(adapter, staging, given)


def _prove(adapter: Adapter, written: Path, to: str, given: Conversion) -> float:
    """Read back what was written and compare all of it; the largest relative error.

    Raises:
        WorkError: something is missing or differs by more than rounding.
    """
    again = Conversion(
        model=given.model,
        base=given.base,
        alpha=alpha_written(adapter, given),
        parts=_parts_written(adapter),
        prefix=given.prefix,
    )
    found = differences(adapter, _read(written, to, again))
    # A difference that is no number is none that is small enough.
    broken = {name: error for name, error in found.items() if not error <= _TOLERANCE}
    if broken:
        where, error = max(broken.items(), key=lambda item: (math.isnan(item[1]), item[1]))
        raise WorkError(
            "what was written does not read back as what it was made from",
            where=where,
            expected=f"a relative error of at most {_TOLERANCE:g}",
            found=f"{error:.3g}, and {len(broken)} of {len(found)} changes beyond it",
        )
    return max(found.values(), default=0.0)


def _parts_written(adapter: Adapter) -> tuple[str, ...]:
    parts = (n.rpartition(".")[2] for n, f in adapter.factors.items() if f.rows is not None)
    return tuple(dict.fromkeys(parts))


def _base_model(source: Path, source_format: str, ref: str) -> PreTrainedModel:
    """The base without weights; with a classification head where the source brings one.

    A base as it is published has the head it was pretrained with, which no classifier keeps.
    """
    model = empty_model(ref)
    head = None
    if source_format == PEFT and _stated(source, "task_type") == "SEQ_CLS":
        head = classifying_head(sort_tensors(read_tensors(source), source).overrides)
    elif source_format == LoralibFormat.name:
        head = LoralibFormat().head(source)
    if head is None:
        return model
    name, found = head
    own = dict(model.named_parameters()).get(name)
    if own is not None and own.shape[0] == found:
        return model
    names = tuple(map(str, range(found))) if found > 1 else ()
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    return empty_classifier(
        model.config, ClassificationHead(names=names, pad_token_id=padding, seed=0)
    )


def _named_base(source: Path, source_format: str) -> str:
    """The base that the source names itself."""
    key = {PEFT: "base_model_name_or_path", "mlx": "model"}.get(source_format)
    name = _stated(source, key) if key is not None else None
    if isinstance(name, str) and name:
        return name
    raise RequestError(
        "the base is needed: its configuration tells names and shapes",
        where=str(source),
        remedy="name it: --base REF (no weights are read)",
    )


def _stated(source: Path, key: str) -> Any:
    """A value of the source's configuration; None where that cannot be had."""
    try:
        return json.loads((source / CONFIG_NAME).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def _convert_experts(source: Path, output: Path, to: str, base: str | None) -> dict[str, Any]:
    ref = base or _named_base(source, PEFT)
    model = empty_model(ref)
    if not has_experts(source) and not one_by_one(list(read_tensors(source)), model):
        raise RequestError(
            "only PEFT's adapters on stacked expert weights have these two layouts",
            where=str(source),
            expected="target_parameters in adapter_config.json, or experts one by one that the "
            "base holds stacked",
            remedy="--to peft writes an ordinary adapter",
        )
    layout = "peft-0.18" if to == "peft-0.18" else "peft-0.19"
    with atomic_directory(output) as staging:
        moved = convert_experts(source, staging, model, layout)
    return {"from": PEFT, "to": to, "base": ref, "output": str(output), **moved}
