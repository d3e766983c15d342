"""`key=value` on the command line, on top of a config file."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorakit.errors import ConfigError, nearest
from lorakit.train import schema
from lorakit.train.yaml import parse_value


def apply_overrides(
    cls: type, values: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """A copy of the values of a config of class `cls` with the overrides put in.

    A name is a full one ("train.lr"), the end of exactly one ("lr"), or the end of one in the
    section that `method` names; a value is YAML.

    Raises:
        ConfigError: an override without "=", a name that is unknown or fits several keys, a value
            that is not YAML.
    """
    pairs: list[tuple[str, Any]] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                "this override is not key=value",
                where=override,
                expected="key=value, for example train.lr=1e-4",
            )
        pairs.append((name.strip(), parse_value(text, where=override)))
    return put_values(cls, values, pairs)


def put_values(
    cls: type, values: Mapping[str, Any], pairs: Iterable[tuple[str, Any]]
) -> dict[str, Any]:
    """A copy of the values of a config of class `cls` with these (name, value) put in.

    Raises:
        ConfigError: a name that is unknown or fits several keys.
    """
    result: dict[str, Any] = copy.deepcopy(dict(values))
    aliases = _aliases(cls)
    names = [leaf.name for leaf in schema.leaves(cls)]
    for name, value in pairs:
        full = _resolve(name, names, aliases, section=_section(result))
        _put(result, full.split("."), value, aliases)
    return result


def full_name(cls: type, values: Mapping[str, Any], name: str) -> str:
    """The full name of the key that a name of `apply_overrides` stands for.

    Raises:
        ConfigError: it is unknown or fits several keys.
    """
    names = [leaf.name for leaf in schema.leaves(cls)]
    return _resolve(name, names, _aliases(cls), section=_section(values))


def _section(values: Mapping[str, Any]) -> str:
    return str(values.get("method", "lora"))


def _aliases(cls: type) -> dict[str, str]:
    """Sections that a bare value may stand for -> the leaf it stands for."""
    hints = typing.get_type_hints(cls)
    found: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        shorthand = schema.shorthand_of(hint) if isinstance(hint, type) else None
        if shorthand is not None:
            found[field.name] = schema.join(field.name, shorthand)
    return found


def _resolve(name: str, names: Sequence[str], aliases: Mapping[str, str], *, section: str) -> str:
    if name in names:
        return name
    if name in aliases:
        return aliases[name]
    fitting = [full for full in names if full.endswith(f".{name}")]
    if len(fitting) == 1:
        return fitting[0]
    # Sections of methods share names, and only the chosen method's section may be set.
    if f"{section}.{name}" in fitting:
        return f"{section}.{name}"
    if fitting:
        raise ConfigError(
            f"{name!r} fits several keys",
            where=name,
            expected="one of " + ", ".join(fitting),
            remedy="write the full name",
        )
    inside = [full for full in names if full.startswith(f"{name}.")]
    if inside:
        raise ConfigError(
            f"{name!r} is a section, not a key",
            where=name,
            expected=f"one of its keys: {', '.join(inside[:4])}, ...",
            remedy="list them with: lorakit train --fields",
        )
    # The last part first: against full names a short one is close to whatever is short too.
    last = name.rpartition(".")[2]
    leaves = [full.rpartition(".")[2] for full in names]
    close = [full for full in nearest(name, names) if "." in name]
    close += [names[leaves.index(leaf)] for leaf in nearest(last, leaves, n=1)]
    close += nearest(name, names)
    raise ConfigError(
        f"unknown key {name!r}",
        where=name,
        expected="a key of the config",
        remedy=f"did you mean {close[0]!r}?" if close else "list them with: lorakit train --fields",
    )


def _put(values: dict[str, Any], path: list[str], value: Any, aliases: Mapping[str, str]) -> None:
    head, *rest = path
    if not rest:
        values[head] = value
        return
    section = values.get(head)
    if section is None:
        section = {}
    elif isinstance(section, str) and head in aliases:
        section = {aliases[head].rpartition(".")[2]: section}
    if not isinstance(section, dict):
        # The reader names this section's mistake; an override must not hide it.
        return
    values[head] = section
    _put(section, rest, value, aliases)
