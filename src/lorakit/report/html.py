"""Write a report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup, escape

from lorakit.files import write_text
from lorakit.formatting import format_estimate, format_number, format_share
from lorakit.report.details import readable, words
from lorakit.report.figures import loss_curve
from lorakit.report.method_figures import score_against_parameters, validation_curves
from lorakit.report.schema import Cell, Report

# A query may return a whole table: a sample shows its beginning.
_MAX_ROWS = 5
_NUMBER = re.compile(r"(about )?[-+±−]?\d[\d,.]*(e[-+]?\d+)?(\s|$|\*|x)")
_EMPTY = ("", "–", "-", "refused", "none")


def write_report(report: Report, path: str | Path) -> Path:
    """Write a report as one self-contained HTML file, whole or not at all.

    Args:
        report: the sections; see `lorakit.report.schema`.
        path: the HTML file.

    Returns:
        The path.

    Raises:
        OutputError: the disk refuses.
    """
    path = Path(path)
    write_text(path, render_report(report))
    return path


def render_report(report: Report) -> str:
    """The HTML text of a report: inline styles and drawings, no scripts, nothing fetched."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorakit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast("dict[str, Callable[..., Any]]", environment.filters)
    filters["cell"] = _cell_text
    filters["interval"] = _interval_text
    filters["interval_below"] = _interval_below
    filters["mark"] = _mark
    filters["value"] = _value_text
    filters["table_text"] = _table_text
    filters["drawing"] = Markup
    filters["numeric"] = _numeric_columns
    curve = report.get("curve")
    plot = report.get("method_plot")
    curves = [c for c in report.get("method_curves", []) if any(c["runs"])]
    sections: dict[str, Any] = {
        "subtitle": "",
        "tiles": [],
        "comparison": None,
        "methods": None,
        "sections": [],
        "samples": [],
        "certificate": None,
        "command": "",
        **report,
        "method_plot": (
            Markup(score_against_parameters(plot)) if plot and plot["points"] else None
        ),
        "method_curves": Markup(validation_curves(curves)) if curves else None,
        "details": readable(report.get("details", {})),
        "curve": Markup(loss_curve(curve)) if curve and curve["train"] else None,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return environment.get_template("report.html.j2").render(sections)


def _cell_text(cell: Cell, share: bool) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Mapping):
        return format_estimate({"value": cell["value"]}, share=share)
    return format_share(cell) if share else format_number(cell)


def _interval_text(cell: Cell, share: bool) -> str:
    if not isinstance(cell, Mapping) or not cell.get("interval"):
        return ""
    low, high = cell["interval"]
    if share:
        return f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{format_number(float(low))} to {format_number(float(high))}"


def _interval_below(text: str) -> Markup:
    """A cell's text; an interval behind a number, which is wide, goes on a line of its own."""
    value, bracket, interval = text.partition(" [")
    if not bracket or not _NUMBER.match(text):
        return escape(text)
    return Markup('{}<span class="interval">[{}</span>').format(value, interval)


def _mark(cell: Cell) -> dict[str, float] | None:
    """Where a share's dot and its interval lie on a line from 0 to 100, or None."""
    if isinstance(cell, Mapping):
        value, (low, high) = cell["value"], cell.get("interval") or (cell["value"],) * 2
    elif isinstance(cell, int | float):
        value = low = high = cell
    else:
        return None
    if not 0 <= value <= 1:
        return None
    low, high = max(0.0, low), min(1.0, high)
    return {"value": 100 * value, "low": 100 * low, "width": 100 * (high - low)}


def _numeric_columns(rows: list[list[str]]) -> list[bool]:
    """Which columns of a table hold numbers: every cell that is filled begins with one."""
    return [
        all(_NUMBER.match(cell) or cell in _EMPTY for cell in cells)
        and not all(cell in _EMPTY for cell in cells)
        for cells in zip(*rows, strict=True)
    ]


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{words(key)} {_value_text(inner)}" for key, inner in value.items())
            or "none"
        )
    if isinstance(value, list | tuple):
        return ", ".join(_value_text(inner) for inner in value) or "none"
    return "none" if value is None else str(value)


def _table_text(rows: list[list[Any]] | None) -> str:
    """The rows that a query returned, one line each."""
    if rows is None:
        return ""
    if not rows:
        return "no rows"
    lines = [" | ".join("NULL" if v is None else str(v) for v in row) for row in rows[:_MAX_ROWS]]
    if len(rows) > _MAX_ROWS:
        lines.append(f"... {len(rows) - _MAX_ROWS} more rows")
    return "\n".join(lines)
