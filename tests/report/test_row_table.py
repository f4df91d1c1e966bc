"""Tables and plots with one line for all seeds."""

import numpy as np
import pytest

from dinov2_eq.report.figures import as_svg
from dinov2_eq.report.row_table import Line, cell, draw, markdown, names_of, table

LINES = [
    Line("task", [{"R2 mean": 0.5, "20-NN %": 50.0}, {"R2 mean": 0.75, "20-NN %": 53.25}], {"R2 rotation": 0.9}),
    Line("plain", [{"20-NN %": 54.0}]),
    Line("to do", []),
]


@pytest.mark.parametrize("values", [[0.25, 0.5, 0.625], [-0.125, 0.25], [50.0, 52.0, 55.5]])
def test_a_cell_against_numpy(values):
    digits = 1 if max(values) > 1.5 else 3
    assert cell(values) == f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def test_every_number_is_in_its_column():
    header, rows = table(LINES)
    assert header == ["row", "runs", "R2 rotation", "R2 mean", "20-NN %"] and names_of(LINES) == header[2:]
    assert rows == [
        ["task", "2", "", "0.625 ± 0.177", "51.6 ± 2.3"],
        ["plain", "1", "", "", "54.0"],
        ["to do", "0", "", "", ""],
    ]
    lines = markdown(header, rows).splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {6}
    assert markdown(header, rows, words=2).splitlines()[1] == "| --- | --- | ---: | ---: | ---: |"


def test_the_plot_has_a_dot_for_each_run():
    figure = draw(LINES)
    dots = {
        axes.get_title(): sorted(tuple(point) for marks in axes.collections for point in marks.get_offsets())
        for axes in figure.axes
    }
    assert (0.5, 0.0) in dots["R2 mean"] and (0.75, 0.0) in dots["R2 mean"]
    assert {(50.0, 0.0), (53.25, 0.0), (54.0, 1.0)} <= set(dots["20-NN %"])
    assert (0.9, 0.0) in dots["R2 rotation"]  # published
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["task", "plain", "to do"]
    assert as_svg(draw(LINES)) == as_svg(draw(LINES)) and draw([]).axes
