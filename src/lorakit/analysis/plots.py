"""The drawings of an analysis, as inline SVG in the report's style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lorakit.analysis.pairs import Similarity
from lorakit.analysis.spectra import Spectrum
from lorakit.analysis.training import SiteAtStep
from lorakit.formatting import format_number
from lorakit.report.figures import GRID, STYLE, svg_of

# Of middle lightness, so that they hold on a white and on a dark page.
_COLOURS = (
    "#3b76d6", "#d0651b", "#2a9d6f", "#b5489b", "#8f7420",
    "#c23b3b", "#1f9bb5", "#7a5bd0", "#7d8b12", "#6b7686",
)  # fmt: skip
_MARKERS = "osD^vPX*<>"
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_PANELS_IN_ROW = 4


def leaf_of(site: str) -> str:
    """What a site is, whatever its layer: `q_proj`, `attention.output.dense`, `c_attn.q`."""
    parts = _LAYER.split(site)
    return parts[-1] if len(parts) > 1 else site.rpartition(".")[2] or site


def layer_of(site: str) -> int | None:
    """The number of the layer that a site is in, or None for one that is in none."""
    found = _LAYER.search(site)
    return int(found[1]) if found else None


def short_names(sites: Iterable[str]) -> dict[str, str]:
    """Site -> its leaf, as short as it may be while different leaves stay different."""
    leaves = {site: leaf_of(site) for site in sites}
    ends = {leaf: leaf.rpartition(".")[2] for leaf in set(leaves.values())}
    unique = len(set(ends.values())) == len(ends)
    return {site: ends[leaf] if unique else leaf for site, leaf in leaves.items()}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart by layer says beside its lines.

    Attributes:
        label: of the vertical axis.
        log: whether that axis is logarithmic.
        reference: a level to compare with, and what it is.
        bottom: where the axis begins, or None.
        top: where it ends, or None.
    """

    label: str
    log: bool = False
    reference: tuple[float, str] | None = None
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
                **_look(number),
                label=name,
            )
        _finish(axes, chart)
        axes.set_xlabel("layer")
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def over_steps(rows: Sequence[SiteAtStep], chart: Chart) -> str:
    """The mean norm of each kind of site over the optimizer steps."""
    names = short_names(row.site for row in rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(names.values())):
            at: dict[int, list[float]] = {}
            for row in rows:
                if names[row.site] == name:
                    at.setdefault(row.step, []).append(row.norm)
            steps = sorted(at)
            axes.plot(
                steps,
                [sum(at[step]) / len(at[step]) for step in steps],
                **_look(number),
                label=name,
            )
            if any(len(norms) > 1 for norms in at.values()):
                axes.fill_between(
                    steps,
                    [min(at[step]) for step in steps],
                    [max(at[step]) for step in steps],
                    color=_COLOURS[number % len(_COLOURS)],
                    alpha=0.12,
                    linewidth=0,
                )
        _finish(axes, chart)
        axes.set_xlabel("optimizer step")
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def spectra(found: Mapping[str, Spectrum]) -> str:
    """Singular values relative to the first, the median over the layers, by kind of site."""
    names = short_names(found)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(names.values())):
            curves = [
                [value / spectrum.singular_values[0] for value in spectrum.singular_values]
                for site, spectrum in found.items()
                if names[site] == name and spectrum.norm > 0
            ]
            if not curves:
                continue
            length = max(map(len, curves))
            median = [_median([c[k] for c in curves if len(c) > k]) for k in range(length)]
            axes.plot(range(1, length + 1), median, **_look(number), label=name)
        _finish(axes, Chart(label="singular value / the first", bottom=0, top=1.03))
        axes.set_xlabel("direction")
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def heat_maps(found: Sequence[Similarity], labels: tuple[str, str]) -> str:
    """phi(i, j) of some sites (Figures 3 and 4), and of two Gaussian matrices for comparison.

    Args:
        found: the sites to draw.
        labels: the two adapters.
    """
    names = short_names(s.site for s in found)
    panels = [(f"{names[s.site]}{_in_layer(s.site)}", s.phi) for s in found]
    panels.append(("two Gaussian matrices", found[0].control))
    columns = min(_PANELS_IN_ROW, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.5 + 2.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        image = None
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.set_axis_off()
                continue
            title, phi = panels[number]
            r1, r2 = phi.shape
            image = axes.imshow(
                phi.numpy(),
                vmin=0,
                vmax=1,
                cmap="viridis",
                aspect="auto",
                origin="upper",
                interpolation="nearest",
                extent=(0.5, r2 + 0.5, r1 + 0.5, 0.5),
            )
            axes.set_title(title, fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        figure.supxlabel(f"j, leading directions of {labels[1]}", fontsize=10)
        figure.supylabel(f"i, of {labels[0]}", fontsize=10)
        if image is not None:
            figure.colorbar(image, ax=grid, shrink=0.8, label="phi(i, j)", aspect=30)
        return svg_of(figure)


def _in_layer(site: str) -> str:
    layer = layer_of(site)
    return "" if layer is None else f", layer {layer}"


def _look(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def _finish(axes: Axes, chart: Chart) -> None:
    axes.set_ylabel(chart.label)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_number(float(y))))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=chart.bottom, top=chart.top)
    if chart.reference is not None:
        level, what = chart.reference
        axes.axhline(level, color=STYLE["text.color"], linewidth=1, linestyle="--")
        axes.annotate(
            what,
            (1, level),
            xycoords=("axes fraction", "data"),
            fontsize=9,
            ha="right",
            va="bottom",
        )
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.margins(x=0.02)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
