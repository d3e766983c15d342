"""Every other number of a record, grouped and written for a reader."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.formatting import format_bytes, format_duration

# Shown elsewhere in the report, or for programs only.
_NOT_DETAILS = (
    "title",
    "subtitle",
    "tiles",
    "samples",
    "command",
    "kind",
    "systems",
    "differences",
    "outputs",
    "merge",
    "metrics",
)
# As much of a hash as tells two apart.
_HASH_CHARS = 12
_HASH = re.compile(r"[0-9a-f]{40,}")
# More inner values than this, or another level below them, become a group of their own.
_MAX_INNER = 4


def details(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scalars under "Run", each dict of values under its own name; estimates are left out."""
    groups: dict[str, dict[str, Any]] = {"Run": {}}
    for key, value in record.items():
        if key in _NOT_DETAILS or _holds_estimates(value):
            continue
        if key == "config" and isinstance(value, Mapping):
            for section, inner in details(value).items():
                name = "Config" if section == "Run" else f"Config: {section.lower()}"
                groups.setdefault(name, {}).update(inner)
        elif isinstance(value, Mapping):
            groups[words(key).capitalize()] = _facts(value)
        elif _says_something(value):
            groups["Run"][words(key)] = with_unit(key, value)
    return {name: facts for name, facts in groups.items() if facts}


def readable(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The groups as a page shows them.

    Large inner dicts become groups of their own, lists of objects are left out, hashes are cut, and
    times and bytes have their units.
    """
    shown: dict[str, dict[str, Any]] = {}
    for name, facts in groups.items():
        for title, inner in _flat(name, facts):
            if inner:
                shown[title] = inner
    return shown


def with_unit(key: str, value: Any) -> Any:
    """A number as text with the unit that its key names; anything else as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("_bytes") or key == "bytes":
            return format_bytes(value)
        if key == "seconds" or (key.endswith("_s") and not key.endswith("_per_s")):
            return format_duration(value)
    return value


def words(key: str) -> str:
    """A key as words."""
    return str(key).replace("_", " ")


def _flat(name: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    own: dict[str, Any] = {}
    groups: dict[str, Mapping[str, Any]] = {}
    for key, value in facts.items():
        if value in ("", [], {}, ()):
            continue
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            continue  # for programs, or drawn
        if isinstance(value, Mapping) and _is_large(value):
            groups[key] = value
        elif isinstance(value, Mapping):
            own[_short(key)] = {_short(k): _text(k, v) for k, v in value.items()}
        else:
            own[_short(key)] = _text(key, value)
    yield name, own
    for key, value in groups.items():
        yield from _flat(f"{name}: {words(key)}", value)


def _is_large(value: Mapping[str, Any]) -> bool:
    return len(value) > _MAX_INNER or any(isinstance(inner, Mapping) for inner in value.values())


def _short(key: str) -> str:
    """A key as words, without the unit that its value now has, and without "num"."""
    text = words(key)
    if text.endswith(" per s"):
        return text
    return re.sub(r"^num (?=\w)|(?<=\w) (s|bytes)$", "", text)


def _text(key: str, value: Any) -> Any:
    value = with_unit(str(key).replace(" ", "_"), value)
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:_HASH_CHARS]
    if isinstance(value, str) and "T" in value:
        try:
            moment = datetime.datetime.fromisoformat(value)
        except ValueError:
            return value
        return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return value


def _facts(values: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in values.items():
        if key == "ranks" and isinstance(value, Mapping):
            continue  # one per site: drawn
        if isinstance(value, Mapping):
            inner = {words(k): with_unit(k, v) for k, v in value.items() if _says_something(v)}
            value = inner
        if _says_something(value):
            facts[words(key)] = with_unit(key, value)
    return facts


def _says_something(value: object) -> bool:
    return value not in (None, "", [], {}, ())


def _holds_estimates(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    is_one = "value" in value and "interval" in value
    return is_one or any(_holds_estimates(inner) for inner in value.values())
