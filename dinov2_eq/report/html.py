"""The few HTML elements that the page is made of."""

from collections.abc import Iterable, Sequence
from html import escape

from dinov2_eq.report.runs import Run


def badge(run: Run) -> str:
    return f'<b class="badge" style="background:{run.color}">{run.letter}</b>'


def figure(uri: str, alt: str, title: str, caption: str) -> str:
    image = f'<img src="{uri}" alt="{escape(alt)}">'
    return f"<figure><h4>{escape(title)}</h4>{image}<figcaption>{caption}</figcaption></figure>"


def panels(figures: Sequence[str]) -> str:
    """Figures side by side as far as the screen is wide."""
    return f'<div class="panels">{"".join(figures)}</div>'


def table(head: str, rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls on its own where the screen is too narrow."""
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def labelled_row(label: str, values: Iterable[str], kind: str = "") -> str:
    cells = "".join(f"<td>{value}</td>" for value in values)
    return f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{cells}</tr>'


def missing(run: Run, what: str, verb: str, command: str) -> str:
    return f'<p class="missing">{badge(run)} {escape(what)}; {verb} <code>{escape(command)}</code></p>'
