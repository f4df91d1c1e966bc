"""Summary of results files in one table: a row for each encoder, a column for each number."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import as_written, read_json, replace_text


class Entry(NamedTuple):
    """One evaluation of one encoder."""

    encoder: str
    evaluation: str
    state: str  # done, failed or submitted
    numbers: dict[str, float]
    note: str = ""  # why it failed


def numbers_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a results file by name: accuracies, or the first encoder's R2 by task and border."""
    if "rows" not in results:
        return dict(_leaves(results["results"]))
    rows = results["rows"]
    own = [row for row in rows if row["encoder"] == rows[0]["encoder"]]
    means = [row for row in results["summary"] if row["encoder"] == rows[0]["encoder"]]
    found = {f"R2 {_words(row, 'task', 'border', 'tokens', 'head')}": row["r2_pooled"] for row in own}
    return found | {f"R2 {row['name']}": row["r2_pooled"] for row in means}


def _words(row: Mapping[str, Any], *keys: str) -> str:
    return " ".join(str(row[key]) for key in keys if key in row)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, inner in value.items():
        name = f"{prefix} {key}".strip()
        if isinstance(inner, Mapping):
            yield from _leaves(inner, name)
        elif isinstance(inner, (int, float)):
            yield name, float(inner)


class Summary(NamedTuple):
    """Formats entries as one table."""

    header: list[str]
    rows: list[list[str]]  # one for each encoder; missing numbers are empty cells
    problems: list[str]  # what is not done, and why

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        return text + "".join(f"\n- {problem}" for problem in self.problems) + ("\n" if self.problems else "")


def summarise(entries: Sequence[Entry]) -> Summary:
    columns = list(dict.fromkeys((entry.evaluation, name) for entry in entries for name in entry.numbers))
    encoders = list(dict.fromkeys(entry.encoder for entry in entries))
    found = {(entry.encoder, entry.evaluation, name): n for entry in entries for name, n in entry.numbers.items()}
    return Summary(
        ["encoder", *(f"{evaluation}: {name}" for evaluation, name in columns)],
        [[encoder, *(_cell(found.get((encoder, *column))) for column in columns)] for encoder in encoders],
        [
            f"{entry.encoder}, {entry.evaluation}: {entry.state}{'; ' if entry.note else ''}{entry.note}"
            for entry in entries
            if entry.state != "done"
        ],
    )


def write_summary(folder: Path, entries: Sequence[Entry]) -> Summary:
    """Writes summary.json, summary.csv and summary.md to `folder`."""
    summary = summarise(entries)
    write_results(folder / "summary.json", {"entries": [entry._asdict() for entry in entries]})
    with (folder / "summary.csv").open("w", newline="") as file:
        csv.writer(file).writerows([summary.header, *summary.rows])
    replace_text(folder / "summary.md", summary.markdown())
    return summary


def read_numbers(folder: Path) -> dict[str, float]:
    """Reads the numbers of all results files in a folder.

    Raises:
        OSError, ValueError: a file cannot be read, was cut off, or is no results file; the message names it.
    """
    numbers: dict[str, float] = {}
    for path in sorted(folder.glob("results_eval_*.json")):
        with as_written(path):
            numbers |= numbers_of(read_json(path))
    return numbers


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"
