"""What the specs of the methods share: plain values in and out, and checks of single fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from lorakit.errors import SpecError, unknown_name


class Spec(Protocol):
    """A frozen dataclass whose fields all have defaults."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


S = TypeVar("S", bound=Spec)

ALSO_TRAIN = {"help": "whole modules trained beside, by name or suffix (a new head)"}


def spec_from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
    """A spec from plain values; lists become tuples.

    Raises:
        SpecError: an unknown key (with the nearest known one) or a wrong value.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise unknown_name(SpecError, f"unknown key {key!r}", key, known, where=cls.__name__)
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**tuples)


def spec_to_dict(spec: Spec) -> dict[str, Any]:
    """Plain values, ready for JSON or YAML; `spec_from_dict` reads them back."""
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def require_names(where: str, value: object) -> None:
    """Refuse what is not a tuple of names.

    Raises:
        SpecError: it is something else, or a name is empty.
    """
    fits = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
    if not fits:
        raise SpecError(
            f"{where} must be a list of names", where=where, expected="a list", found=repr(value)
        )


def require_whole(where: str, value: object, *, least: int) -> None:
    """Refuse what is not a whole number of at least `least`.

    Raises:
        SpecError: it is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(
            f"{where} must be a whole number of at least {least}",
            where=where,
            expected=f"{where} >= {least}",
            found=repr(value),
        )


def require_choice(where: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is not one of the choices.

    Raises:
        SpecError: it is something else.
    """
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise SpecError(
            f"{where} is not one of its choices",
            where=where,
            expected=", ".join(str(choice) for choice in choices),
            found=repr(value),
        )
