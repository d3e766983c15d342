"""Which modules a configuration of PEFT targets: its `check_target_module_exists`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def beyond_targets(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Modules whose tensors PEFT passes over, because the configuration does not target them.

    Args:
        config: adapter_config.json.
        names: the modules that the file has updates of.
    """
    targets = config.get("target_modules")
    # What is tied to a target is adapted with it.
    if not targets or targets == "all-linear" or config.get("ensure_weight_tying"):
        return []
    try:
        return [name for name in names if not _is_targeted(config, targets, name)]
    except re.error:  # refused where the targets are read
        return []


def _is_targeted(config: Mapping[str, Any], targets: Any, name: str) -> bool:
    excluded = config.get("exclude_modules")
    if excluded and _means(excluded, name):
        return False
    if isinstance(targets, str) or name in targets:
        return _means(targets, name)
    return _means(targets, name) and _is_in_layers(config, name)


def _means(pattern: Any, name: str) -> bool:
    """A string is an expression for the whole name; a list has names, and ends of names."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return name in pattern or any(name.endswith(f".{end}") for end in pattern)


def _is_in_layers(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    given = config.get("layers_pattern") or r"[^.]*"
    for pattern in [given] if isinstance(given, str) else given:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            index = int(found.group(1))
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False
