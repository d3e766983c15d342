"""Any method's directory onto a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorakit.adapters.attachments import require_attached
from lorakit.adapters.identity import require_same_base
from lorakit.errors import AdapterFileError, RequestError
from lorakit.formats.peft import load_adapter
from lorakit.methods.base import Method
from lorakit.methods.files import Saved, read_saved, read_state
from lorakit.methods.full import FullMethod, read_full_state
from lorakit.methods.lora import LoraMethod
from lorakit.methods.registry import build_method


def load_saved(
    model: nn.Module, path: str | Path, name: str = "default", *, any_base: bool = False
) -> Method:
    """Put what a method saved onto its base, strictly; mutates `model`.

    Args:
        model: the base it was made on.
        path: the directory: PEFT's layout, a method's own, or a fully fine-tuned model.
        name: for PEFT's layout, the adapter's name on this model.
        any_base: bind even if the passport names another base.

    Returns:
        The method, attached and active; `disabled` gives the base, also for full fine-tuning.

    Raises:
        AdapterFileError: files that cannot be read, tensors missing, extra or misshapen.
        BaseMismatchError: the passport names another base.
        TargetError, SpecError: the method cannot be on this model.
    """
    saved = read_saved(path)
    if saved.name == LoraMethod.name:
        load_adapter(model, path, name=name, any_base=any_base)
        return LoraMethod(require_attached(model, name).spec, name)
    method = build_saved(saved)
    if not any_base:
        require_same_base(model, saved.passport)
    is_full = isinstance(method, FullMethod)
    state = read_full_state(model, saved.path) if is_full else read_state(saved.path)
    method.attach(model)
    method.load(model, state)
    return method


def build_saved(saved: Saved) -> Method:
    """The method of a directory, not attached; `disabled` will work.

    Raises:
        AdapterFileError: its options are not ones this version knows.
    """
    keep = {"keep_base": True} if saved.name == FullMethod.name else {}
    try:
        return build_method(saved.name, {**saved.options, **keep})
    except RequestError as error:
        raise AdapterFileError(
            f"the passport names a method that cannot be made: {error.what}",
            where=str(saved.path),
            expected=error.expected,
            found=error.found,
            remedy="update lorakit, or copy the directory again",
        ) from error
