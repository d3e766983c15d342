"""Drawings by layer: one value per site, one line for each kind of site."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lorakit.formatting import format_number
from lorakit.report.figures import GRID, STYLE, svg_of

# Of middle lightness, so that they hold on a white and on a dark page.
COLOURS = (
    "#3b76d6", "#d0651b", "#2a9d6f", "#b5489b", "#8f7420",
    "#c23b3b", "#1f9bb5", "#7a5bd0", "#7d8b12", "#6b7686",
)  # fmt: skip
_MARKERS = "osD^vPX*<>"
_REFERENCE_LINES = ("--", ":", "-.")
MAX_REFERENCES = len(_REFERENCE_LINES)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def leaf_of(site: str) -> str:
    """What a site is, whatever its layer: `q_proj`, `attention.output.dense`, `c_attn.q`."""
    parts = _LAYER.split(site)
    return parts[-1] if len(parts) > 1 else site.rpartition(".")[2] or site


def layer_of(site: str) -> int | None:
    """The number of the layer that a site is in, or None for one that is in none."""
    found = _LAYER.search(site)
    return int(found[1]) if found else None


def short_names(sites: Iterable[str]) -> dict[str, str]:
    """Site -> what kind of site it is, as short as it may be while different kinds stay different.

    A kind is a leaf, and where a model has several stacks of layers (an encoder and a decoder) also
    the stack: `decoder q_proj`.
    """
    leaves = {site: leaf_of(site) for site in sites}
    ends = {leaf: leaf.rpartition(".")[2] for leaf in set(leaves.values())}
    unique = len(set(ends.values())) == len(ends)
    names = {site: ends[leaf] if unique else leaf for site, leaf in leaves.items()}
    stacks = _stacks(names)
    return {site: f"{stacks[site]} {n}" if site in stacks else n for site, n in names.items()}


def _stacks(sites: Iterable[str]) -> dict[str, str]:
    """Site -> the word that tells its stack of layers from the others; empty if there is one."""
    before = {s: s[: found.start()].split(".") for s in sites if (found := _LAYER.search(s))}
    different = {tuple(words) for words in before.values()}
    if len(different) < 2:
        return {}
    longest = max(map(len, different))
    at = next(k for k in range(longest) if len({words[k : k + 1] for words in different}) > 1)
    return {site: ".".join(words[at : at + 1]) for site, words in before.items()}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart by layer says beside its lines.

    Attributes:
        label: of the vertical axis.
        log: whether that axis is logarithmic.
        references: levels to compare with, and what each is.
        bottom: where the axis begins, or None.
        top: where it ends, or None.
    """

    label: str
    log: bool = False
    references: tuple[tuple[float, str], ...] = ()
    bottom: float | None = None
    top: float | None = None


def by_layer(values: Mapping[str, float], chart: Chart) -> str:
    """One value per site over the layers, one line for each kind of site.

    Args:
        values: site -> value; sites outside the layers stand at the left end.
        chart: what it says.
    """
    names = short_names(values)
    lines: dict[str, list[tuple[int, float]]] = {}
    for site, value in values.items():
        layer = layer_of(site)
        lines.setdefault(names[site], []).append((-1 if layer is None else layer, value))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, points) in enumerate(lines.items()):
            points.sort()
            axes.plot(
                [layer for layer, _ in points],
                [value for _, value in points],
                **look(number),
                label=name,
            )
        finish(axes, chart)
        axes.set_xlabel("layer")
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def look(number: int) -> dict[str, Any]:
    """Colour and marker of one line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def finish(axes: Axes, chart: Chart) -> None:
    """Label and scale the vertical axis, draw the grid and the reference; mutates `axes`."""
    axes.set_ylabel(chart.label)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_number(float(y))))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # Values that hardly differ would leave no room above them.
        highest = float(axes.dataLim.y1)
        room = 1.05 * highest if chart.bottom == 0 and highest > 0 else None
        axes.set_ylim(bottom=chart.bottom, top=room if chart.top is None else chart.top)
    for (level, what), line in zip(chart.references, _REFERENCE_LINES, strict=False):
        axes.axhline(
            level, color=STYLE["text.color"], linewidth=1, linestyle=line, zorder=1, label=what
        )
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.margins(x=0.02)
