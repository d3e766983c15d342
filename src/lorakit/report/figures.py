"""The drawings of a report, as inline SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorakit.report.schema import Curve

# Stand-ins that no drawing uses for anything else: the page's variables take their place, so that
# one file is right in light and in dark.
INK, GRID, _TRAIN, _VALIDATION = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {
    INK: "var(--ink-soft)",
    GRID: "var(--line)",
    _TRAIN: "var(--accent)",
    _VALIDATION: "var(--second)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorakit",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Beyond this many points a curve only gets larger, not clearer.
_MAX_POINTS = 1500


def loss_curve(curve: Curve) -> str:
    """Training loss (each step pale, smoothed strong) and validation loss over optimizer steps.

    Or mean rewards, where the curve is one of those.
    """
    rewards = curve.get("measure") == "reward"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        _draw_training(axes, curve["train"])
        _draw_validation(axes, curve)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("mean reward" if rewards else "loss (nats per learned token)")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        if not rewards:  # which may be below 0, and have no first spikes
            axes.set_ylim(bottom=0, top=_top(curve))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        # Above the drawing: inside it would cover a curve that stays high.
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        return svg_of(figure)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start as Adam corrects its moments."""
    result: list[float] = []
    mean, scale = 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        result.append(mean / scale)
    return result


def _draw_training(axes: Axes, points: Sequence[Sequence[float]]) -> None:
    if not points:
        return
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    # Smooth over about a thirtieth of the run.
    weight = 1 - 1 / max(1.0, len(points) / 30)
    smooth = smoothed(losses, weight)
    stride = math.ceil(len(points) / _MAX_POINTS)
    axes.plot(steps[::stride], losses[::stride], color=_TRAIN, alpha=0.28, linewidth=0.9)
    axes.plot(
        steps[::stride],
        smooth[::stride],
        color=_TRAIN,
        linewidth=2.0,
        label=f"training, smoothed ({smooth[-1]:.3g} at the end)",
    )


def _draw_validation(axes: Axes, curve: Curve) -> None:
    points = curve.get("validation") or []
    if not points:
        return
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    choose = max if curve.get("measure") == "reward" else min
    best = choose(range(len(points)), key=losses.__getitem__)
    axes.plot(
        steps,
        losses,
        color=_VALIDATION,
        linewidth=1.6,
        marker="o",
        markersize=5,
        label=f"validation (best {losses[best]:.3g} at step {steps[best]:.0f})",
    )


def _top(curve: Curve) -> float | None:
    """Leave out the first spikes when they would flatten the rest of the curve."""
    losses = sorted(point[1] for point in curve["train"])
    if len(losses) < 20:
        return None
    high = losses[int(0.99 * (len(losses) - 1))]
    shown = [high, *(point[1] for point in curve.get("validation") or [])]
    return 1.08 * max(shown) if losses[-1] > 1.5 * high else None


def svg_of(figure: Figure) -> str:
    """The drawing as inline SVG with the page's colours."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # The XML prologue with its external DTD has no place inside a page.
    text = text[text.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.strip()
