"""The drawings of a comparison of methods: one colour per method, in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lorakit.formatting import format_number, format_share
from lorakit.report.figures import GRID, STYLE, svg_of
from lorakit.report.schema import MethodCurve, MethodPlot

# Of middle lightness, so that they hold on a white and on a dark page.
_COLOURS = (
    "#3b76d6", "#d0651b", "#2a9d6f", "#b5489b", "#8f7420",
    "#c23b3b", "#1f9bb5", "#7a5bd0", "#7d8b12", "#6b7686",
)  # fmt: skip
_MARKERS = "osD^vPX*<>"


def score_against_parameters(plot: MethodPlot) -> str:
    """The score of each method over log10 of its trained parameters (the paper's Figure 2).

    Methods share a colour where they are settings of one method; the marker tells them apart.
    """
    points = plot["points"]
    looks = _looks([(point["name"], point["method"]) for point in points])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            score = point["score"]
            value, interval = score["value"], score.get("interval")
            error = None
            if interval:
                error = [[value - interval[0]], [interval[1] - value]]
            colour, marker = looks[point["name"]]
            axes.errorbar(
                point["trainable_params"],
                value,
                yerr=error,
                color=colour,
                marker=marker,
                markersize=7.5,
                capsize=3.5,
                linestyle="none",
                linewidth=1.3,
                label=point["name"],
            )
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel(plot["metric"])
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        axes.xaxis.set_minor_formatter(FuncFormatter(_count_between))
        axes.yaxis.set_major_locator(MaxNLocator(7))
        if all(0 <= point["score"]["value"] <= 1 for point in points):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_share(y)))
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.08, y=0.12)
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def validation_curves(curves: Sequence[MethodCurve]) -> str:
    """Validation loss over optimizer steps, one line per run."""
    looks = _looks([(curve["name"], curve["method"]) for curve in curves])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour, marker = looks[curve["name"]]
            for run in curve["runs"]:
                steps, losses = [p[0] for p in run], [p[1] for p in run]
                axes.plot(
                    steps,
                    losses,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    alpha=0.8,
                )
        handles = [
            Line2D([], [], color=looks[c["name"]][0], marker=looks[c["name"]][1], label=c["name"])
            for c in curves
        ]
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("validation loss")
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(handles=handles, frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def _looks(names: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Colour by method, marker by setting."""
    methods = list(dict.fromkeys(method for _, method in names))
    looks: dict[str, tuple[str, str]] = {}
    for name, method in names:
        number = sum(looks_of == method for _, looks_of in names[: names.index((name, method))])
        colour = _COLOURS[methods.index(method) % len(_COLOURS)]
        looks[name] = (colour, _MARKERS[number % len(_MARKERS)])
    return looks


def _count_between(value: float, _: Any) -> str:
    """At 2 and 5 of a decade: the others would run into each other."""
    return _count(value, _) if f"{value:e}"[0] in "25" else ""


def _count(value: float, _: Any) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{format_number(value / size)}{unit}"
    return format_number(value)
