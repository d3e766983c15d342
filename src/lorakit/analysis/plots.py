"""The drawings of an analysis, as inline SVG in the report's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorakit.analysis.pairs import Similarity
from lorakit.analysis.spectra import Spectrum
from lorakit.analysis.training import SiteAtStep
from lorakit.report.figures import STYLE, svg_of
from lorakit.report.layer_figures import COLOURS, Chart, finish, layer_of, look, short_names

_PANELS_IN_ROW = 4


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
                **look(number),
                label=name,
            )
            if any(len(norms) > 1 for norms in at.values()):
                axes.fill_between(
                    steps,
                    [min(at[step]) for step in steps],
                    [max(at[step]) for step in steps],
                    color=COLOURS[number % len(COLOURS)],
                    alpha=0.12,
                    linewidth=0,
                )
        finish(axes, chart)
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
            middle = [median(c[k] for c in curves if len(c) > k) for k in range(length)]
            axes.plot(range(1, length + 1), middle, **look(number), label=name)
        finish(axes, Chart(label="singular value / the first", bottom=0, top=1.03))
        axes.set_xlabel("direction")
        figure.legend(frameon=False, loc="outside right upper", fontsize=9.5)
        return svg_of(figure)


def heat_maps(found: Sequence[Similarity], labels: tuple[str, str]) -> str:
    """phi(i, j) of some sites (Figures 3 and 4), and of Gaussian matrices of each size d beside.

    Args:
        found: the sites to draw.
        labels: the two adapters.
    """
    names = short_names(s.site for s in found)
    panels = [(f"{names[s.site]}{_in_layer(s.site)}", s.phi) for s in found]
    controls = {s.d: s.control for s in reversed(found)}
    panels += [(f"Gaussian, d = {d}", controls[d]) for d in sorted(controls)]
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
