"""From a method's name in a configuration to the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.adapters.spec import LoraSpec
from lorakit.errors import ConfigError, unknown_name
from lorakit.methods.base import Method
from lorakit.methods.bitfit import BitFitMethod, BitFitSpec
from lorakit.methods.bottleneck import BottleneckMethod, Design
from lorakit.methods.bottleneck_spec import AdapterDropSpec, BottleneckSpec
from lorakit.methods.full import FullMethod, FullSpec
from lorakit.methods.last_layers import LastLayersMethod, LastLayersSpec
from lorakit.methods.lora import LoraMethod
from lorakit.methods.prefix import PrefixMethod
from lorakit.methods.prefix_spec import PrefixEmbeddingSpec, PrefixLayerSpec
from lorakit.methods.spec import spec_from_dict


def _bottleneck(design: Design, options: Mapping[str, Any]) -> Method:
    return BottleneckMethod(design, spec_from_dict(BottleneckSpec, options))


def _adapterdrop(spec: AdapterDropSpec) -> Method:
    return BottleneckMethod(spec.placement, spec)


# One line per method: its name, and what makes it of the values of its section.
_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Method]] = {
    "lora": lambda options: LoraMethod(LoraSpec.from_dict(options)),
    "full": lambda options: FullMethod(spec_from_dict(FullSpec, options)),
    "last_layers": lambda options: LastLayersMethod(spec_from_dict(LastLayersSpec, options)),
    "bitfit": lambda options: BitFitMethod(spec_from_dict(BitFitSpec, options)),
    "prefix_embedding": lambda o: PrefixMethod(spec_from_dict(PrefixEmbeddingSpec, o)),
    "prefix_layer": lambda o: PrefixMethod(spec_from_dict(PrefixLayerSpec, o)),
    "houlsby": lambda options: _bottleneck("houlsby", options),
    "lin": lambda options: _bottleneck("lin", options),
    "pfeiffer": lambda options: _bottleneck("pfeiffer", options),
    "adapterdrop": lambda options: _adapterdrop(spec_from_dict(AdapterDropSpec, options)),
}

METHODS = tuple(_BUILDERS)


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with its options.

    Args:
        name: a key of `METHODS`.
        options: the method's own section of the configuration (for lora, the fields of LoraSpec).

    Raises:
        ConfigError: no such method.
        SpecError: options that cannot be.
    """
    require_method(name)
    return _BUILDERS[name](options)


def require_method(name: str) -> None:
    """Refuse a name that no method has.

    Raises:
        ConfigError: no such method; the nearest is named.
    """
    if name not in _BUILDERS:
        raise unknown_name(
            ConfigError, f"there is no method {name!r}", name, METHODS, where="method"
        )
