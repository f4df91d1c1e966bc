"""Reads a table of a paper: its published numbers, and the settings of our rows for them.

title: TEXT
columns: {NAME: TASK of `dinov2-eq eval equivariance`, ...}
theirs: {CONDITION: TEXT, ...}
forms: {NAME: [key=value, ...], ...}            words for several settings
scales: {budget: {data: {...}, evaluations: {...}}, paper: {...}}
rows:
  NAME:
    published: [a number or null for each column]
    source: paper and table
    note: what else differs
    budget: [RECIPE, form or key=value, ...]    our row with `--budget MINUTES`
    paper: [RECIPE, form or key=value, ...]     and with `--budget paper`
    open: why there is no row of ours
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.config.load import find_recipe
from dinov2_eq.config.yaml_files import read_yaml
from dinov2_eq.files import as_written, check_types

PAPER, BUDGET = "paper", "budget"
SECTIONS = {"title", "columns", "theirs", "forms", "scales", "rows"}
ENTRIES = {"published", "source", "note", "open", PAPER, BUDGET}


class System(NamedTuple):
    """A row of a table."""

    name: str
    published: dict[str, float]  # by column; those that the paper gives
    source: str
    note: str
    open: str  # why there is no row of ours; "" if there is one
    recipe: str  # path
    settings: list[str]  # key=value


class PaperTable(NamedTuple):
    path: Path
    title: str
    columns: dict[str, str]  # task of the equivariance evaluation by name
    theirs: dict[str, str]  # conditions of the published numbers
    data: dict[str, str]  # data strings, train and val
    evaluations: dict[str, Any]
    systems: list[System]


def read_table(path: Path, scale: str) -> PaperTable:
    """Reads a table with the rows of a scale, `PAPER` or `BUDGET`.

    Raises:
        OSError: the file or a recipe cannot be read.
        ValueError: the file is not such a table; the message names it.
    """
    content = read_yaml(path, resolve=True)
    if wrong := (content.keys() - SECTIONS) | (SECTIONS - {"forms"} - content.keys()):
        raise ValueError(
            f"{path}: section {sorted(map(str, wrong))[0]!r} is missing or unknown; a table of a paper has "
            f"{', '.join(sorted(SECTIONS))}"
        )
    with as_written(path):
        columns, chosen = dict(content["columns"]), content["scales"].get(scale, {"data": {}, "evaluations": {}})
        check_types([*columns, *columns.values(), content["title"]], str)
        systems = [
            _system(path, str(name), dict(entry or {}), list(columns), content.get("forms") or {}, scale)
            for name, entry in content["rows"].items()
        ]
        data, evaluations = dict(chosen["data"]), dict(chosen["evaluations"])
        return PaperTable(path, content["title"], columns, dict(content["theirs"]), data, evaluations, systems)


def _system(
    path: Path, name: str, entry: Mapping[str, Any], columns: Sequence[str], forms: Mapping[str, list[str]], scale: str
) -> System:
    if unknown := entry.keys() - ENTRIES:
        raise ValueError(
            f"{path}: row {name!r} has the unknown entry {sorted(unknown)[0]!r}; known are {', '.join(sorted(ENTRIES))}"
        )
    numbers = entry.get("published", [None] * len(columns))
    if len(numbers) != len(columns):
        raise ValueError(f"{path}: row {name!r} has {len(numbers)} published numbers for {len(columns)} columns")
    check_types(numbers, float | int | None)
    published = {column: number for column, number in zip(columns, numbers, strict=True) if number is not None}
    if published and "source" not in entry:
        raise ValueError(f"{path}: row {name!r} has published numbers without their source")
    words = entry.get(scale, [])
    reason = entry.get("open", "")
    if not words and not reason:
        reason = {PAPER: "the paper's schedule is not known", BUDGET: "there is no small recipe"}[scale]
    recipe = "" if reason else str(find_recipe(words[0], path.parent, f"{path}: row {name!r}:"))
    return System(
        name, published, entry.get("source", ""), entry.get("note", ""), reason, recipe, _settings(words[1:], forms)
    )


def _settings(words: Sequence[str], forms: Mapping[str, list[str]]) -> list[str]:
    """Replaces each form by its settings; raises LookupError for an unknown one."""
    return [setting for word in words for setting in ([word] if "=" in word else forms[word])]
