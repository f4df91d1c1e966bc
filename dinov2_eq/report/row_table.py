"""A table and a plot with one line for the runs that differ only in their seed."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure

from dinov2_eq.report.figures import INK, tidy
from dinov2_eq.report.runs import COLORS

OWN, PUBLISHED = COLORS[0], COLORS[1]


class Line(NamedTuple):
    """Numbers of the runs of one line, by name; each run may lack some."""

    label: str
    runs: Sequence[Mapping[str, float]]
    published: Mapping[str, float] = {}

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs if name in run]


def names_of(lines: Sequence[Line]) -> list[str]:
    """All numbers of any line, in the order of their first appearance."""
    return list(dict.fromkeys(name for line in lines for run in (line.published, *line.runs) for name in run))


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation over the runs, such as "0.590 ± 0.012"; percentages with one digit less."""
    if not values:
        return ""
    digits = 1 if max(map(abs, values)) > 1.5 else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Formats a table whose first `words` columns hold words and whose others hold numbers."""
    lines = [header, [*["---"] * words, *["---:"] * (len(header) - words)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: label, number of runs, and each number as mean ± standard deviation over them."""
    names = names_of(lines)
    rows = [[line.label, str(len(line.runs)), *(cell(line.values(name)) for name in names)] for line in lines]
    return ["row", "runs", *names], rows


def draw(lines: Sequence[Line]) -> Figure:
    """Draws one panel for each number: a dot for each run, a bar for their mean, a diamond for what was published."""
    names = names_of(lines) or [""]
    figure = Figure(figsize=(1.8 + 1.7 * len(names), 0.9 + 0.32 * len(lines)), layout="constrained")
    figure.patch.set_visible(False)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        for place, line in enumerate(lines):
            values = line.values(name)
            axes.scatter(values, [place] * len(values), s=18, color=OWN, linewidths=0)
            if values:
                axes.vlines(mean(values), place - 0.28, place + 0.28, color=OWN, linewidth=1.6)
            if name in line.published:
                axes.scatter(line.published[name], place, s=30, marker="D", facecolors="none", edgecolors=PUBLISHED)
        axes.set_title(name, fontsize=8, color=INK)
        axes.margins(x=0.15)
        axes.patch.set_visible(False)
        tidy(axes)
        axes.tick_params(colors=INK)
        axes.spines[:].set(color=INK)
    panels[0].set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
    panels[0].set_ylim(max(len(lines), 1) - 0.5, -0.5)
    return figure
