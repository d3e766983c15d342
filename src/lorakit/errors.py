"""Every error lorakit raises: what is wrong, where, expected, found, and the remedy.

LorakitError
├── RequestError (ValueError)      the request was wrong: exit code 2
│   ├── ConfigError                a config file, a key, a value, an override
│   ├── SpecError                  a LoraSpec that cannot be
│   ├── TargetError                a target that matches nothing, or nothing adaptable
│   ├── ModelError                 a base model that cannot be found or read
│   ├── DataError                  a data file, a row, a column, a loss mask
│   ├── AdapterFileError           an adapter whose files cannot be read or do not bind
│   ├── BaseMismatchError          an adapter made for another base
│   ├── StateError                 attach, use, merge, detach in an order that cannot be
│   ├── OutputError                a directory that is not empty, a disk that is full
│   ├── MemoryPlanError            a plan that does not fit in memory
│   └── UnknownAdapterError        a name that is not served
└── WorkError (RuntimeError)       the work failed: exit code 1
    ├── TrainingError              a loss that is not finite, a run that cannot go on
    ├── MergeError                 a merge whose proof failed
    ├── ServeError                 a forward pass or an adapter that failed while serving
    └── QueueFullError             more requests than may wait: try again later
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar


class LorakitError(Exception):
    """Base of every error of this package.

    Args:
        what: one sentence that says what is wrong.
        where: the site, file, line or key.
        expected: what would have been right.
        found: what was there.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        for label in ("where", "expected", "found", "remedy"):
            value = getattr(self, label)
            if value:
                lines = value.replace("\n", "\n" + " " * 12)
                parts.append(f"  {label + ':':<10}{lines}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep every field when the error crosses a process."""
        return _rebuild, (type(self), self.what, self.where, self.expected, self.found, self.remedy)


def _rebuild(
    kind: type[LorakitError],
    what: str,
    where: str | None,
    expected: str | None,
    found: str | None,
    remedy: str | None,
) -> LorakitError:
    return kind(what, where=where, expected=expected, found=found, remedy=remedy)


class RequestError(LorakitError, ValueError):
    """The request was wrong."""

    exit_code = 2


class ConfigError(RequestError):
    """A config file, key, value or override is wrong."""


class SpecError(RequestError):
    """A LoraSpec that cannot be."""


class TargetError(RequestError):
    """A target that matches nothing, or nothing that can be adapted."""


class ModelError(RequestError):
    """A base model that cannot be found, read or used."""


class DataError(RequestError):
    """A data file, a row, a column or a loss mask is wrong."""


class AdapterFileError(RequestError):
    """An adapter whose files cannot be read, or whose tensors do not bind."""


class BaseMismatchError(RequestError):
    """An adapter that was made for another base model."""


class StateError(RequestError):
    """Attach, use, merge or detach in an order that cannot be."""


class OutputError(RequestError):
    """A place that cannot be written: not empty, not writable, full."""


class MemoryPlanError(RequestError):
    """A plan that does not fit in memory."""


class UnknownAdapterError(RequestError):
    """An adapter that is asked for by a name that is not served."""


class WorkError(LorakitError, RuntimeError):
    """The work failed."""


class TrainingError(WorkError):
    """A loss that is not finite, or a run that cannot go on."""


class MergeError(WorkError):
    """A merge whose proof failed."""


class ServeError(WorkError):
    """A request that failed while it was served."""


class QueueFullError(WorkError):
    """More requests than may wait."""


class LorakitWarning(UserWarning):
    """Something the user should know that does not stop the work."""


E = TypeVar("E", bound=LorakitError)


def nearest(name: str, known: Iterable[str], *, n: int = 4) -> list[str]:
    """The known names closest to `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)


def unknown_name(
    error: type[E],
    what: str,
    name: str,
    known: Iterable[str],
    *,
    where: str | None = None,
    otherwise: str | None = None,
) -> E:
    """The error for a name that is none of the known ones; its remedy names the nearest.

    Args:
        error: its class.
        what: what is wrong, with the name in it.
        name: what was asked for.
        known: what there is, in the order in which it is listed.
        where: the place.
        otherwise: the remedy when none is close.
    """
    names = list(known)
    close = nearest(name, names, n=1)
    return error(
        what,
        where=where,
        expected=", ".join(names),
        remedy=f"did you mean {close[0]!r}?" if close else otherwise,
    )
