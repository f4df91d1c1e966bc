"""Renders the results of `dinov2-eq eval all` as one page with a table."""

from collections.abc import Sequence
from html import escape

from dinov2_eq.report.html import labelled_row, page, table


def render_evaluations(header: Sequence[str], rows: Sequence[Sequence[str]], problems: Sequence[str]) -> str:
    """Renders one HTML page that needs no other file and no network.

    Args:
        header: column titles; the first column names the encoder.
        rows: one row per encoder, as long as the header.
        problems: one sentence for each missing result.
    """
    encoders = [name for name, *_ in rows]
    head = f'<th scope="col">{escape(header[0])}</th>' + "".join(f'<th scope="col">{escape(e)}</th>' for e in encoders)
    # There are few encoders and many numbers, so one row per number keeps the page narrow.
    lines = [
        labelled_row(name, [escape(row[column]) for row in rows]) for column, name in enumerate(header[1:], start=1)
    ]
    body = table(head, lines)
    if problems:
        body += f"<ul>{''.join(f'<li>{escape(problem)}</li>' for problem in problems)}</ul>"
    counted = f"{len(rows)} encoder{'s' if len(rows) != 1 else ''}, {len(header) - 1} numbers each"
    return page(
        "Evaluations",
        kicker="dinov2_eq evaluations",
        intro="Every number is in the folder of its encoder and evaluation, with the protocol that it depends on.",
        kind="Encoders",
        shown=(),
        claims={"numbers": ("All numbers", f"{counted}. An empty cell was not measured.")},
        bodies={"numbers": body},
        command="dinov2-eq eval all",
    )
