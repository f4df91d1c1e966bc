"""The HTML elements of the pages, and the page around them."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Protocol

from dinov2_eq.report.runs import Run
from dinov2_eq.report.style import CSS

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header>
<p class="kicker">$kicker</p>
<h1>$title</h1>
<p>$intro</p>
</header>
<nav aria-label="$kind">$legend</nav>
<main>$sections</main>
<footer>Written on $date by <code>$command</code>. The page is self-contained and loads nothing.</footer>
</body>
</html>
""")

SECTION = Template('<section id="$anchor"><h2>$title</h2><p class="claim">$claim</p>$body</section>\n')


class Marked(Protocol):
    """A run or encoder, which has the same name, letter and colour throughout a page."""

    name: str
    letter: str
    color: str


def page(
    title: str,
    *,
    kicker: str,
    intro: str,
    kind: str,
    shown: Sequence[Marked],
    claims: Mapping[str, tuple[str, str]],
    bodies: Mapping[str, str],
    command: str,
) -> str:
    """Renders a whole page.

    Args:
        title: plain text.
        kicker, intro, command: HTML for the line above the title, the text below it, and the command in the footer.
        kind: label of the legend, such as "Runs".
        shown: entries of the legend.
        claims: title and first sentences of each section by its anchor, as HTML.
        bodies: rest of each section by its anchor.
    """
    return PAGE.substitute(
        title=escape(title),
        css=CSS,
        kicker=kicker,
        intro=intro,
        kind=kind,
        legend="".join(f"<span>{badge(entry)} {escape(entry.name)}</span>" for entry in shown),
        sections="".join(
            SECTION.substitute(anchor=anchor, title=title, claim=claim, body=bodies[anchor])
            for anchor, (title, claim) in claims.items()
        ),
        date=datetime.date.today().isoformat(),
        command=command,
    )


def badge(run: Marked) -> str:
    """The letter of a run or encoder on its colour."""
    return f'<b class="badge" style="background:{run.color}">{run.letter}</b>'


def figure(uri: str, alt: str, title: str, caption: str) -> str:
    """A picture with its title and caption."""
    image = f'<img src="{uri}" alt="{escape(alt)}">'
    return f"<figure><h4>{escape(title)}</h4>{image}<figcaption>{caption}</figcaption></figure>"


def panels(figures: Sequence[str]) -> str:
    """Figures in as many columns as fit the screen."""
    return f'<div class="panels">{"".join(figures)}</div>'


def table(head: str, rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls by itself if the screen is too narrow."""
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def labelled_row(label: str, values: Iterable[str], kind: str = "") -> str:
    """A table row with a label in its first cell."""
    cells = "".join(f"<td>{value}</td>" for value in values)
    return f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{cells}</tr>'


def missing(run: Run, what: str, verb: str, command: str) -> str:
    """A note about something that a run lacks, with the command that makes it."""
    return f'<p class="missing">{badge(run)} {escape(what)}; {verb} <code>{escape(command)}</code></p>'
