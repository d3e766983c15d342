"""Which columns hold the text and the label of a classification task, and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorakit.data.rows import Rows
from lorakit.data.targets import LabelKind, Targets, find_targets
from lorakit.errors import ConfigError, DataError, nearest, unknown_name

CLASSIFY_ROLES = ("text", "text_pair", "label")

# GLUE's names of its sentences, then the usual others; pairs first, since QNLI has `sentence` too.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
_SINGLES = ("sentence", "text")
_LABELS = ("label", "labels", "score", "target", "class")


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """How rows become classification examples.

    Raises:
        ConfigError: a column for a role that does not exist, or classes that cannot be.
    """

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    labels: LabelKind = "auto"
    classes: tuple[str, ...] = ()
    max_length: int | None = None
    on_too_long: Literal["cut", "drop", "error"] = "cut"

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in CLASSIFY_ROLES:
                raise unknown_name(
                    ConfigError,
                    f"unknown role {role!r} for task classify",
                    role,
                    CLASSIFY_ROLES,
                    where="columns",
                    otherwise="role: your column",
                )
        if self.classes and (len(set(self.classes)) < len(self.classes) or len(self.classes) < 2):
            raise ConfigError(
                "these cannot be the classes",
                where="classes",
                expected="at least two different names",
                found=", ".join(self.classes),
            )
        if self.classes and self.labels == "regression":
            raise ConfigError(
                "a regression has no classes",
                where="labels and classes",
                expected="one of them",
                remedy="remove classes, or set labels: classes",
            )


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold the text, the second text or None, and the label."""

    text: str
    text_pair: str | None
    label: str


def find_columns(rows: Rows, options: ClassifyOptions) -> Columns:
    """Which columns are meant: those that were named, else the first known names that are there.

    Raises:
        DataError: a named column is missing, or none of the known names is there.
    """
    there = list(rows[0])
    for role, name in options.columns.items():
        if name not in there:
            close = nearest(name, there, n=1)
            raise DataError(
                f"a row without the column {name!r}",
                where=f"{rows.origin(0)}, columns.{role}",
                found=f"columns: {', '.join(there)}",
                remedy=f"did you mean {close[0]!r}?" if close else "name another column",
            )
    text, pair = _text_columns(rows, options)
    label = options.columns.get("label") or next((n for n in _LABELS if n in there), None)
    if label is None:
        raise DataError(
            "no column holds the label",
            where=rows.origin(0),
            expected=f"a column {', '.join(_LABELS)}",
            found=f"columns: {', '.join(there)}",
            remedy="name it, as in columns: {label: your_column}",
        )
    return Columns(text, pair, label)


def _text_columns(rows: Rows, options: ClassifyOptions) -> tuple[str, str | None]:
    there = list(rows[0])
    named, pair = options.columns.get("text"), options.columns.get("text_pair")
    if named is not None:
        return named, pair
    if pair is not None:
        raise ConfigError(
            "a second text needs a first",
            where="columns",
            expected="{text: your_column, text_pair: your_second_column}",
            remedy="name both",
        )
    for first, second in _PAIRS:
        if first in there and second in there:
            return first, second
    for name in _SINGLES:
        if name in there:
            return name, None
    pairs = ", ".join(f"{first} and {second}" for first, second in _PAIRS)
    raise DataError(
        "no column holds the text",
        where=rows.origin(0),
        expected=f"a column {' or '.join(_SINGLES)}, or a pair: {pairs}",
        found=f"columns: {', '.join(there)}",
        remedy="name it, as in columns: {text: your_column}",
    )


def targets_of(rows: Rows, options: ClassifyOptions, *, known: Sequence[str] = ()) -> Targets:
    """What the labels of the training rows are; see `find_targets`.

    Raises:
        DataError: see `find_columns` and `find_targets`.
    """
    column = find_columns(rows, options).label
    return find_targets(rows, column, kind=options.labels, classes=options.classes, known=known)
