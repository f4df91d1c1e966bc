"""The results of a sweep: sweep.json with every row, sweep.md with a line for all seeds of a row, and sweep.svg."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.evaluation.results import write_results
from dinov2_eq.evaluation.summary import Entry
from dinov2_eq.files import replace_text
from dinov2_eq.report.figures import as_svg
from dinov2_eq.report.row_table import Line, draw, markdown, table
from dinov2_eq.report.rows import PROBES, headline, row_of, untrained_rows
from dinov2_eq.report.runs import Run, load_runs
from dinov2_eq.run.sweep_file import Row


class Outcome(NamedTuple):
    """How far a row is."""

    row: Row
    folder: Path
    state: str  # done, failed or submitted
    note: str  # why it is not done
    entries: list[Entry]  # its evaluations


def write_tables(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes sweep.json, sweep.md and sweep.svg."""
    runs = {outcome.folder: load_runs([outcome.folder])[0] for outcome in outcomes if done(outcome)}
    rows = [json_row(outcome, runs.get(outcome.folder)) for outcome in outcomes]
    untrained = untrained_rows([*runs.values()])
    write_results(folder / "sweep.json", {"rows": rows, "untrained": untrained})
    lines = [*lines_of(rows), *(Line(f"untrained {row['arch']}", [headline(row)]) for row in untrained)]
    text = markdown(*table(lines)) + "".join(f"\n- {problem}" for problem in problems_of(outcomes))
    replace_text(folder / "sweep.md", f"{text.rstrip()}\n")
    replace_text(folder / "sweep.svg", as_svg(draw(lines)))


def done(outcome: Outcome) -> list[Entry]:
    """The evaluations of a row that have results."""
    return [entry for entry in outcome.entries if entry.state == "done"]


def json_row(outcome: Outcome, run: Run | None) -> dict[str, Any]:
    """A row as in sweep.json, with the settings and results of its run if it has results."""
    return {
        "row": outcome.row.label,
        "state": outcome.state,
        "note": outcome.note,
        "recipe": Path(outcome.row.recipe).stem,
        "settings": list(outcome.row.own),
        **(row_of(run) if run else {"run": outcome.folder.name, "seed": outcome.row.seed}),
        "numbers": {entry.evaluation: entry.numbers for entry in done(outcome)},
    }


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line for all seeds of a row: its headline, and the numbers of evaluations that this has none of."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        numbers = headline(row)
        for evaluation, values in row["numbers"].items():
            if evaluation not in PROBES:
                numbers |= {f"{evaluation}: {name}": value for name, value in values.items()}
        found.setdefault(row["row"], []).extend([numbers] if numbers else [])
    return [Line(label, runs) for label, runs in found.items()]


def problems_of(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{outcome.row.label}, seed {outcome.row.seed}: {outcome.state}; {outcome.note}"
        for outcome in outcomes
        if outcome.state != "done"
    ]
