"""The few HTML elements that pages are made of, and the page around them."""

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
<footer>Written on $date by <code>$command</code>. The page holds all it shows and loads nothing.</footer>
</body>
</html>
""")

SECTION = Template('<section id="$anchor"><h2>$title</h2><p class="claim">$claim</p>$body</section>\n')


class Marked(Protocol):
    """What keeps a name, a letter and a colour throughout a page."""

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
    """A whole page.

    Args:
        title: plain text.
        kicker, intro, command: HTML: the line above the title, the text below it, and what wrote the page.
        kind: what `shown` are.
        shown: for the legend.
        claims: by anchor: title and first sentences of each section, as HTML.
        bodies: by anchor: what follows them.
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
