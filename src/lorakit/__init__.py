"""Train a small adapter on a frozen language model, prove what it does, fold it in or serve it.

The names below are the public API. They are imported when they are first used, so that
`import lorakit` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that has it.
_EXPORTS = {
    "Adapter": "lorakit.formats.peft",
    "AdapterPlan": "lorakit.adapters.plan",
    "LoraSpec": "lorakit.adapters.spec",
    "LorakitError": "lorakit.errors",
    "Site": "lorakit.adapters.plan",
    "active_adapter": "lorakit.adapters.attach",
    "attach": "lorakit.formats.peft",
    "compose": "lorakit.adapters.composition.compose",
    "detach": "lorakit.adapters.attach",
    "extract": "lorakit.composing.extract",
    "fingerprint": "lorakit.adapters.fingerprint",
    "initialise_from_data": "lorakit.adapters.data_init",
    "load_adapter": "lorakit.formats.peft",
    "load_model": "lorakit.models.load",
    "merge": "lorakit.adapters.fold",
    "plan_adapter": "lorakit.adapters.plan",
    "save_adapter": "lorakit.formats.peft",
    "unmerge": "lorakit.adapters.fold",
    "use": "lorakit.adapters.attach",
}

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter as Adapter
    from lorakit.adapters.attach import active_adapter as active_adapter
    from lorakit.adapters.attach import attach as attach
    from lorakit.adapters.attach import detach as detach
    from lorakit.adapters.attach import use as use
    from lorakit.adapters.composition.compose import compose as compose
    from lorakit.adapters.data_init import initialise_from_data as initialise_from_data
    from lorakit.adapters.fingerprint import fingerprint as fingerprint
    from lorakit.adapters.fold import merge as merge
    from lorakit.adapters.fold import unmerge as unmerge
    from lorakit.adapters.plan import AdapterPlan as AdapterPlan
    from lorakit.adapters.plan import Site as Site
    from lorakit.adapters.plan import plan_adapter as plan_adapter
    from lorakit.adapters.spec import LoraSpec as LoraSpec
    from lorakit.composing.extract import extract as extract
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.formats.peft import load_adapter as load_adapter
    from lorakit.formats.peft import save_adapter as save_adapter
    from lorakit.models.load import load_model as load_model

__all__ = sorted([*_EXPORTS, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
