"""What the labels of a classification data set are: classes with names, or numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.data.rows import Rows
from lorakit.errors import DataError, nearest

LabelKind = Literal["auto", "classes", "regression"]

_SHOWN = 12
# With more distinct labels than this share of the rows, no class can be learned.
_MOST_DISTINCT = 0.5
_ENOUGH_ROWS = 10


@dataclass(frozen=True, slots=True)
class Targets:
    """What a label may be.

    Attributes:
        names: the classes, in the order of their ids; empty for regression.
        notes: what was decided from the labels, one sentence each.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether a label is a number."""
        return not self.names

    @property
    def num_outputs(self) -> int:
        """Outputs of the head: one per class, or one number."""
        return len(self.names) or 1

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "regression" if self.regression else "classes", "names": list(self.names)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Targets:
        """Read plain values; a missing or impossible one is a KeyError or ValueError."""
        names = tuple(str(name) for name in values["names"])
        if (values["kind"] == "regression") != (not names):
            raise ValueError("classes need names, and numbers have none")
        return cls(names)

    def read(self, value: object, *, where: str) -> int | float:
        """The class id, or the number, of one label.

        Raises:
            DataError: no label, not one of the classes, or not a finite number.
        """
        _refuse_nothing(value, where)
        return _number(value, where) if self.regression else self._class_id(value, where)

    def _class_id(self, value: object, where: str) -> int:
        name = _name_of(value, where)
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < len(self.names) and not _are_numbers(self.names):
            return int(name)
        close = nearest(name, self.names, n=1)
        remedy = f"did you mean {close[0]!r}? " if close else ""
        if name == "-1":
            remedy = "GLUE's test sets hide their labels behind -1: take rows with labels. "
        raise DataError(
            "a label is none of the classes",
            where=where,
            expected=_listed(self.names),
            found=repr(value),
            remedy=remedy + "correct the row, train on rows of this class too, or name all classes "
            "in data.classes",
        )


def find_targets(
    rows: Rows,
    column: str,
    *,
    kind: LabelKind = "auto",
    classes: Sequence[str] = (),
    known: Sequence[str] = (),
) -> Targets:
    """What the labels of the training rows are.

    Whole numbers and texts are classes, in numeric or alphabetical order unless `classes` gives
    one; numbers with a fraction are regression.

    Args:
        rows: the training rows.
        column: where the label stands.
        kind: "classes" or "regression" to decide it; "auto" to find out.
        classes: the names, in the order of their ids; labels are these names or their numbers.
        known: the classes of a head that the base has already, in the order of its outputs; where
            every label is one of them, these are the classes.

    Raises:
        DataError: labels that are missing, of several kinds, all the same, or all different.
    """
    values = [_label(rows, index, column) for index in range(len(rows))]
    if classes:
        return Targets(tuple(classes))
    if kind == "regression":
        return Targets(())
    places = [f"{rows.origin(i)}, column {column!r}" for i in range(len(rows))]
    _refuse_mixed(values, places)
    if kind == "auto" and any(_has_fraction(value) for value in values):
        numbers = [_number(value, place) for value, place in zip(values, places, strict=True)]
        note = (
            f"the labels are numbers with a fraction, from {min(numbers):g} to {max(numbers):g}: "
            "regression (data.labels: classes would make them classes)"
        )
        return Targets((), (note,))
    names = [_name_of(value, place) for value, place in zip(values, places, strict=True)]
    ordered = tuple(sorted(set(names), key=_order))
    _refuse_useless(ordered, rows, column)
    learned = _as_known(ordered, known)
    if learned:
        note = f"the classes are those of the base's own head, in its order: {_listed(learned)}"
        return Targets(learned, (note,))
    return Targets(ordered, _gap_notes(ordered))


def _as_known(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The known classes as the labels spell them; none where a label is another one."""
    spelled = {name.casefold(): name for name in names}
    found = tuple(spelled.get(name.casefold(), name) for name in known)
    fits = len(set(found)) == len(found) and set(names) <= set(found)
    return found if fits and not _are_numbers(names) else ()


def mean_number(rows: Rows, column: str) -> float:
    """The mean of the numbers in a column.

    Raises:
        DataError: a row without a number.
    """
    numbers = [
        _number(_label(rows, index, column), f"{rows.origin(index)}, column {column!r}")
        for index in range(len(rows))
    ]
    return math.fsum(numbers) / len(numbers)


def _label(rows: Rows, index: int, column: str) -> object:
    where = f"{rows.origin(index)}, column {column!r}"
    value = rows[index].get(column)
    _refuse_nothing(value, where)
    return value


def _refuse_nothing(value: object, where: str) -> None:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(
            "a row without a label",
            where=where,
            expected="a class or a number",
            found="null" if value is None else repr(value),
            remedy="give the row a label, or remove it",
        )


def _refuse_mixed(values: Sequence[object], places: Sequence[str]) -> None:
    first = isinstance(values[0], str)
    for value, place in zip(values, places, strict=True):
        if isinstance(value, str) != first:
            raise DataError(
                "the labels are of two kinds",
                where=place,
                expected="texts as in the first row" if first else "numbers as in the first row",
                found=repr(value),
                remedy="write all labels the same way",
            )


def _refuse_useless(names: tuple[str, ...], rows: Rows, column: str) -> None:
    where = f"{rows.source}, column {column!r}"
    if len(names) == 1:
        raise DataError(
            "all rows have the same label: there is nothing to learn",
            where=where,
            expected="at least two classes",
            found=names[0],
            remedy="give rows of other classes, name all classes in data.classes, or name another "
            "column",
        )
    if len(rows) >= _ENOUGH_ROWS and len(names) > max(2, _MOST_DISTINCT * len(rows)):
        raise DataError(
            "nearly every row has a label of its own: these are no classes",
            where=where,
            expected="classes with several rows each",
            found=f"{len(names)} labels in {len(rows)} rows: {_listed(names)}",
            remedy="name the label's column (data.columns: {label: ...}), or set data.labels: "
            "regression for numbers",
        )


def _gap_notes(names: tuple[str, ...]) -> tuple[str, ...]:
    if not _are_numbers(names) or names == tuple(map(str, range(len(names)))):
        return ()
    return (f"the labels {_listed(names)} become the class ids 0 to {len(names) - 1}",)


def _name_of(value: object, where: str) -> str:
    """A class's name as text: whole numbers in decimal, whatever they were written as."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise DataError(
        "a label cannot be a class",
        where=where,
        expected="a text or a whole number",
        found=repr(value)[:80],
        remedy="for numbers with a fraction: data.labels: regression"
        if isinstance(value, float)
        else "name the label's column (data.columns: {label: ...})",
    )


def _number(value: object, where: str) -> float:
    try:
        # A text is a number in files without types (csv); anything else that float() would take
        # (bytes, objects) is not a label.
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            "the target of a regression is not a number",
            where=where,
            expected="a finite number",
            found=repr(value)[:80],
            remedy="correct the row, or set data.labels: classes",
        )
    return number


def _has_fraction(value: object) -> bool:
    try:
        number = float(value) if isinstance(value, str | float) else 0.0
    except ValueError:
        return False
    return math.isfinite(number) and not number.is_integer()


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.removeprefix("-").isdecimal() for name in names)


def _order(name: str) -> tuple[int, int, str]:
    number = name.removeprefix("-").isdecimal()
    return (0, int(name), "") if number else (1, 0, name)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
