"""What a report is built from: plain values only, as they stand in run records.

An estimate everywhere is {"value": 0.83, "interval": [0.77, 0.88], "n": 160}.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Estimate = dict[str, Any]
# A cell of a comparison: an estimate, a plain number, a text, or nothing.
Cell = Estimate | float | str | None


class Tile(TypedDict):
    """One number at the top: what it is, how much (already formatted), a line below."""

    label: str
    value: str
    note: NotRequired[str]


class ComparisonRow(TypedDict):
    """One metric.

    `share` says that the values are fractions, to be written in percent and drawn from 0 to 1.
    """

    label: str
    cells: list[Cell]
    share: NotRequired[bool]
    note: NotRequired[str]


class Comparison(TypedDict):
    """Systems side by side: one column each, one row per metric."""

    columns: list[str]
    rows: list[ComparisonRow]
    note: NotRequired[str]


class Curve(TypedDict):
    """[step, loss] pairs, or [step, reward] where `measure` says so; `best_step` is marked."""

    train: list[list[float]]
    validation: NotRequired[list[list[float]]]
    best_step: NotRequired[int]
    measure: NotRequired[str]


class SampleAnswer(TypedDict):
    """What one system said; `rows` is what its query returned, if it was one."""

    text: str
    ok: NotRequired[bool | None]
    rows: NotRequired[list[list[Any]] | None]
    error: NotRequired[str | None]


class Sample(TypedDict):
    """One question, the right answer, and the systems' answers."""

    question: str
    reference: str
    reference_rows: NotRequired[list[list[Any]] | None]
    answers: dict[str, SampleAnswer]


class Certificate(TypedDict):
    """The proof of a merge: whether it holds, in one sentence, the numbers, error per layer."""

    passed: bool
    statement: str
    facts: dict[str, Any]
    layers: NotRequired[list[tuple[str, float]]]


class MethodTable(TypedDict):
    """Methods of a comparison, one row each, already formatted; `columns` beside each row.

    `heading` where the rows are something else, and `curves_note` what their curves then are.
    """

    columns: list[str]
    rows: list[list[str]]
    note: NotRequired[str]
    heading: NotRequired[str]
    curves_note: NotRequired[str]


class MethodPoint(TypedDict):
    """One method in the drawing of score against trained parameters."""

    name: str
    method: str
    trainable_params: int
    score: Estimate


class MethodPlot(TypedDict):
    """The paper's Figure 2: what the score is, and a point for each method."""

    metric: str
    points: list[MethodPoint]


class MethodCurve(TypedDict):
    """[step, validation loss] of each final run of one method."""

    name: str
    method: str
    runs: list[list[list[float]]]


class Section(TypedDict):
    """A drawing (inline SVG), a table, already formatted, or both, under a title."""

    title: str
    svg: NotRequired[str]
    columns: NotRequired[list[str]]
    rows: NotRequired[list[list[str]]]
    note: NotRequired[str]


class Report(TypedDict):
    """A whole report; every section but the title may be left out."""

    title: str
    subtitle: NotRequired[str]
    tiles: NotRequired[list[Tile]]
    comparison: NotRequired[Comparison]
    methods: NotRequired[MethodTable]
    method_plot: NotRequired[MethodPlot]
    method_curves: NotRequired[list[MethodCurve]]
    curve: NotRequired[Curve]
    sections: NotRequired[list[Section]]
    samples: NotRequired[list[Sample]]
    certificate: NotRequired[Certificate]
    details: NotRequired[dict[str, dict[str, Any]]]
    command: NotRequired[str]
