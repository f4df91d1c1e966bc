"""Renders a table of a paper beside our numbers: Markdown, and one HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from matplotlib.figure import Figure

from dinov2_eq.report.figures import svg_uri
from dinov2_eq.report.html import figure, page, table
from dinov2_eq.report.row_table import Line, cell, draw, markdown, names_of

PUBLISHED = "published"
KINDS = {"black": "ours, black borders", "masked": "ours, masked", "real": "ours, real borders"}


class Compared(NamedTuple):
    """A row of a paper's table and ours for it."""

    name: str
    published: Mapping[str, float]  # by column
    source: str
    notes: Sequence[str]  # what differs, or why there is no row of ours
    ours: Mapping[str, Sequence[Mapping[str, float]]]  # by a key of KINDS: the numbers of each run


def cells(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table: below each published row ours, for each kind of border."""
    names = names_of(
        [Line(row.name, [run for runs in row.ours.values() for run in runs], row.published) for row in rows]
    )
    lines = []
    for row in rows:
        label = row.name
        if row.published or not any(row.ours.values()):
            lines.append(
                [
                    label,
                    PUBLISHED if row.published else "",
                    *(cell([row.published[n]] if n in row.published else []) for n in names),
                ]
            )
            label = ""
        for kind, runs in row.ours.items():
            if runs:
                numbers = Line(label, runs)
                lines.append([label, KINDS[kind], *(cell(numbers.values(name)) for name in names)])
                label = ""
    return ["row", "", *names], lines


def plot(rows: Sequence[Compared]) -> Figure:
    """Draws what was published and ours with black borders, and ours with real borders on a line of its own."""
    lines = []
    for row in rows:
        lines.append(Line(row.name, row.ours.get("black", ()), row.published))
        if row.ours.get("real"):
            lines.append(Line("real borders", row.ours["real"]))
    return draw(lines)


def notes_of(rows: Sequence[Compared]) -> list[tuple[str, str]]:
    """Source and notes of each row."""
    parts = ((row.name, [*([row.source] if row.source else []), *row.notes]) for row in rows)
    return [(name, "; ".join(texts)) for name, texts in parts if texts]


def as_markdown(title: str, rows: Sequence[Compared], conditions: Sequence[tuple[str, str, str]]) -> str:
    """Renders the page in Markdown.

    Args:
        conditions: what a condition is called, the paper's, and ours.
    """
    header, lines = cells(rows)
    notes = "\n".join(f"- {name}: {text}" for name, text in notes_of(rows))
    return "\n".join(
        [
            f"# {title}\n",
            markdown(header, lines, words=2),
            "## Conditions\n",
            markdown(["", "the paper", "ours"], conditions, words=3),
            "## Rows\n",
            f"{notes}\n",
        ]
    )


def as_html(title: str, rows: Sequence[Compared], conditions: Sequence[tuple[str, str, str]]) -> str:
    """Renders one HTML page that needs no other file and no network; the arguments are those of `as_markdown`."""
    header, lines = cells(rows)
    picture = figure(
        svg_uri(plot(rows)),
        "Published numbers and ours, a panel for each",
        "Published and ours",
        "Diamonds were published. Dots are our runs, with black borders where the line has the name of the row.",
    )
    bodies = {
        "numbers": _table(header, lines),
        "plot": picture,
        "conditions": _table(["", "the paper", "ours"], conditions),
        "rows": _table(["row", "source, and what differs"], notes_of(rows)),
    }
    claims = {
        "numbers": (
            "All numbers",
            "R² of the parameters of a transform, predicted from frozen features; several runs as mean ± standard "
            "deviation. Black borders give rotation and translation away; masked and real borders do not.",
        ),
        "plot": ("At a glance", "The same numbers."),
        "conditions": ("What differs", "Numbers under other conditions cannot be compared without these."),
        "rows": ("The rows", "Where each published number is from, what else differs, and why some rows are open."),
    }
    return page(
        title,
        kicker="dinov2_eq reproduction",
        intro="What a paper published beside what this code gives.",
        kind="Rows",
        shown=(),
        claims=claims,
        bodies=bodies,
        command="dinov2-eq reproduce",
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = [
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in others)}</tr>'
        for first, *others in rows
    ]
    return table(head, body)
