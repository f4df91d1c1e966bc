"""Draws charts as SVG and small pictures as PNG, each as a data URI."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

INK, INK_DARK_MODE = "#454b54", "#c3c8d0"
GRID, GRID_DARK_MODE = "#dcdfe3", "#363b42"
MAX_POINTS = 300  # per curve; longer ones are averaged over windows
MAX_SIDE = 128  # of an embedded picture, in pixels

# An SVG in an <img> only follows the reader's colour scheme if it has its own style sheet.
_DARK_MODE = "".join(
    f'[style*="{prop}: {light}"]{{{prop}:{dark}!important}}'
    for prop in ("fill", "stroke")
    for light, dark in ((INK, INK_DARK_MODE), (GRID, GRID_DARK_MODE))
)
_STYLE = f"<style>@media (prefers-color-scheme: dark){{{_DARK_MODE}}}</style>"


class Curve(NamedTuple):
    """A line of a chart."""

    color: str
    steps: np.ndarray  # [n]
    values: np.ndarray  # [n]


class Bar(NamedTuple):
    """A bar of a chart."""

    group: str  # bars of one group are next to each other under this label
    label: str
    color: str
    value: float
    reference: float | None  # drawn as a tick
    faint: bool
    spread: float = 0.0  # half length of the error bar


def curve_panel(curves: Sequence[Curve]) -> str:
    """Draws curves over the step in one panel; returns an SVG data URI."""
    figure, axes = _panel(height=2.0)
    for curve in curves:
        steps, values = _thinned(curve.steps, curve.values)
        marker = "o" if len(steps) <= 30 else ""
        axes.plot(steps, values, color=curve.color, linewidth=1.5, marker=marker, markersize=2.6)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set(color=INK, fontsize=7.5)
    axes.set_xlabel("step", color=INK, fontsize=8, loc="right", labelpad=1)
    return svg_uri(figure)


def bar_panel(bars: Sequence[Bar]) -> str:
    """Draws grouped horizontal bars with their values; those below -0.1 are cut off. Returns an SVG data URI."""
    positions, ticks, y = [], {}, 0.0
    for i, bar in enumerate(bars):
        y += 1.0 if i == 0 or bars[i - 1].group == bar.group else 1.7
        positions.append(y)
        ticks.setdefault(bar.group, []).append(y)
    figure, axes = _panel(height=0.35 + 0.22 * (y + 0.5))
    for bar, y in zip(bars, positions, strict=True):
        axes.barh(y, max(bar.value, -0.1), height=0.78, color=bar.color, alpha=0.4 if bar.faint else 1.0, linewidth=0)
        end = max(bar.value, 0.0)
        if bar.reference is not None:
            axes.vlines(max(bar.reference, -0.1), y - 0.39, y + 0.39, color=INK, linewidth=1.6)
            end = max(end, bar.reference)
        if bar.spread:
            axes.hlines(y, bar.value - bar.spread, bar.value + bar.spread, color=INK, linewidth=1.2)
            end = max(end, bar.value + bar.spread)
        axes.text(end + 0.02, y, f"{bar.label}  {bar.value:.3f}", va="center", fontsize=8, color=INK)
    axes.set(xlim=(-0.1, 1.22), ylim=(positions[-1] + 0.6, 0.4), xticks=[0, 0.25, 0.5, 0.75, 1.0])
    axes.set_xticklabels(["0", "", "0.5", "", "1"])
    axes.set_yticks([float(np.mean(ys)) for ys in ticks.values()], list(ticks), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=INK, linewidth=0.8)
    return svg_uri(figure)


def angle_panel(curves: Sequence[Curve], top: float, chance: float) -> str:
    """Draws curves over the angle of a full turn; returns an SVG data URI.

    Args:
        curves: `steps` are the angles in degrees, from 0; the value at 0 is repeated at 360.
        top: end of the axis.
        chance: value of the dashed line.
    """
    figure, axes = _panel(height=2.2)
    for curve in curves:
        angles, values = np.append(curve.steps, 360), np.append(curve.values, curve.values[0])
        axes.plot(angles, values, color=curve.color, linewidth=1.5, marker="o", markersize=2.6, clip_on=False)
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set(xlim=(0, 360), ylim=(0, top), xticks=range(0, 361, 90))
    axes.set_xticks(range(0, 361, 15), minor=True)
    axes.tick_params(which="minor", color=INK, width=0.4, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:.0f}\u00b0")
    return svg_uri(figure)


def picture(image: np.ndarray) -> str:
    """Encodes an image [H, W, 3 or 4] in uint8 as a PNG data URI, shrunk so that no side exceeds `MAX_SIDE`."""
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, format="PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def _panel(height: float) -> tuple[Figure, Axes]:
    """Makes an empty chart, 3.5 inches wide (one column of the page, or a phone) and `height` inches high."""
    figure = Figure(figsize=(3.5, height), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set(color=INK, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8, width=0.6, length=3)
    return figure, axes


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages long curves over equal windows, to keep files small; short curves are returned unchanged."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    windows = [np.array_split(array, MAX_POINTS) for array in (steps, values)]
    return np.array([w.mean() for w in windows[0]]), np.array([w.mean() for w in windows[1]])


def tidy(axes: Axes) -> None:
    """Gives the axes of a plot in the documentation small numbers, a thin grid and no frame."""
    axes.tick_params(labelsize=8)
    axes.grid(linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def as_svg(figure: Figure) -> str:
    """Renders a figure as an SVG file; the same figure always gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dinov2_eq"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def svg_uri(figure: Figure) -> str:
    """Renders a figure as an SVG data URI that follows the reader's colour scheme."""
    svg = as_svg(figure)
    start = svg.index("<svg")
    opening_end = svg.index(">", start) + 1
    return _data_uri("image/svg+xml", (svg[start:opening_end] + _STYLE + svg[opening_end:]).encode())


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
