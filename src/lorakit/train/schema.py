"""Plain values into nested frozen dataclasses and back, strictly."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from lorakit.errors import ConfigError, RequestError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldHelp:
    """One leaf of a config: its full name, what it holds, its default and what it means."""

    name: str
    type: str
    default: Any
    required: bool
    help: str


def read(cls: type[T], values: object, *, where: str = "") -> T:
    """An instance of a dataclass from plain values.

    Args:
        cls: a dataclass whose annotations are bool, int, float, str, Literal, None, tuples,
            Mapping[str, X], other dataclasses and unions of them.
        values: a mapping; or, for a class with a `SHORTHAND`, the value of that one field.
        where: the full name of this section, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
        SpecError: a LoraSpec that cannot be.
    """
    shorthand = shorthand_of(cls)
    if shorthand is not None and isinstance(values, str):
        values = {shorthand: values}
    if not isinstance(values, Mapping):
        raise ConfigError(
            "this section must be a mapping",
            where=where or "the config",
            expected="lines of `key: value`",
            found=_found(values),
        )
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    _check_keys(values, fields, where)
    read_values = {
        name: _coerce(hints[name], values[name], join(where, name))
        for name in fields
        if name in values
    }
    try:
        return cls(**read_values)
    except RequestError as error:
        # A section checks its own values and does not know where in the file it stands.
        inner = error.where or ""
        if not where or inner.startswith(f"{where}."):
            raise
        raise type(error)(
            error.what,
            where=join(where, inner) if inner else where,
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error


def plain(value: Any) -> Any:
    """Values ready for JSON or YAML; `read` reads them back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The full names of the leaves in which two `to_dict` results differ, sorted."""
    changed: set[str] = set()
    for key in {*old, *new}:
        name, before, after = join(prefix, key), old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed.update(changed_keys(before, after, name))
        elif before != after:
            changed.add(name)
    return sorted(changed)


def leaves(cls: type, prefix: str = "") -> Iterator[FieldHelp]:
    """Every leaf below a dataclass, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        name = join(prefix, field.name)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, name)
            continue
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        yield FieldHelp(
            name=name,
            type=type_name(hint),
            default=None if required else _default(field),
            required=required,
            help=field.metadata.get("help", ""),
        )


def shorthand_of(cls: type) -> str | None:
    """The one field that a bare string stands for, if the class names one."""
    return vars(cls).get("SHORTHAND")


def join(prefix: str, name: str) -> str:
    """A full name from a section's name and a key."""
    return f"{prefix}.{name}" if prefix else name


def type_name(hint: Any) -> str:
    """What a type asks for, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is Literal:
        return ", ".join(str(arg) for arg in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_plural(args[0])}"
        return f"{len(args)} {_plural(args[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names to {_plural(args[1])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "nothing (null)",
    Any: "a value",
}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts", Any: "values"}


def _plural(hint: Any) -> str:
    return _PLURALS.get(hint, type_name(hint))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return plain(field.default)


def _check_keys(
    values: Mapping[Any, Any], fields: Mapping[str, dataclasses.Field[Any]], where: str
) -> None:
    for key in values:
        if key not in fields:
            raise unknown_name(
                ConfigError, f"unknown key {key!r}", str(key), fields, where=where or "the config"
            )
    for name, field in fields.items():
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not has_default:
            raise ConfigError(
                f"the key {join(where, name)!r} is missing",
                where=where or "the config",
                expected=field.metadata.get("help"),
            )


def _coerce(hint: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where=where)
    matched, result = _match(hint, value)
    if not matched:
        raise ConfigError(
            f"{where} has the wrong type of value",
            where=where,
            expected=type_name(hint),
            found=_found(value),
        )
    return result


def _match(hint: Any, value: object) -> tuple[bool, Any]:
    """Whether the value fits the type, and the value in that type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        attempts = (_match(arg, value) for arg in args)
        return next((attempt for attempt in attempts if attempt[0]), (False, None))
    if origin is Literal:
        fits = any(value == arg and type(value) is type(arg) for arg in args)
        return fits, value
    if origin is tuple:
        return _match_tuple(args, value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _match_mapping(args[1], value)
    return _match_scalar(hint, value)


def _match_scalar(hint: Any, value: object) -> tuple[bool, Any]:
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool, value
    if hint is float:
        fits = isinstance(value, (int, float)) and math.isfinite(value)
        return fits, float(value) if fits else None  # type: ignore[arg-type]
    return isinstance(value, hint), value


def _match_tuple(args: tuple[Any, ...], value: object) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        # A single name where a list of names is asked for is what people write.
        is_name = isinstance(value, str) and args == (str, Ellipsis)
        return is_name, (value,) if is_name else None
    if len(args) == 2 and args[1] is Ellipsis:
        hints = [args[0]] * len(value)
    elif len(args) == len(value):
        hints = list(args)
    else:
        return False, None
    items = [_match(hint, item) for hint, item in zip(hints, value, strict=True)]
    return all(fits for fits, _ in items), tuple(item for _, item in items)


def _match_mapping(hint: Any, value: object) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, None
    items = {key: _match(hint, item) for key, item in value.items()}
    fits = all(isinstance(key, str) and item[0] for key, item in items.items())
    return fits, {key: item for key, (_, item) in items.items()}


def _found(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return f"{value!r} ({type(value).__name__})"
