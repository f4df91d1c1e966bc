"""Reads a sweep: a base recipe, the settings that vary, seeds, and the evaluations of every run.

base: RECIPE
overrides: [key=value, ...]                         for all rows
grid: {key: [value, ...], NAME: {LEVEL: [key=value, ...], ...}}     all combinations
rows: {NAME: [key=value, ...], ...}                 beside the grid
seeds: [0, 1]
data: {train: DATA, val: DATA}
evaluations: {NAME: {program: knn, FLAG: VALUE, ...}, ...}          as in the list of `dinov2-eq eval all`
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.config.load import find_recipe
from dinov2_eq.config.yaml_files import read_yaml

SEED = "train.seed"
SECTIONS = ("base", "overrides", "grid", "rows", "seeds", "data", "evaluations")


class Row(NamedTuple):
    """One training of a sweep."""

    label: str  # the same for all seeds
    seed: int
    recipe: str
    own: tuple[str, ...]  # what distinguishes this row, as key=value
    shared: tuple[str, ...] = ()  # what holds for all rows; `own` overrides it

    @property
    def overrides(self) -> list[str]:
        return [*self.shared, *self.own, f"{SEED}={self.seed}"]

    @property
    def folder_name(self) -> str:
        """The label and the seed without signs that mean something to a shell."""
        parts = [re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in self.label.split(", ")]
        return "-".join([*parts, f"seed_{self.seed}"])


class Sweep(NamedTuple):
    path: Path  # for messages
    rows: list[Row]
    evaluations: dict[str, dict[str, Any] | None]  # flags by name


def read_sweep(
    path: Path, overrides: Sequence[str] = (), train_dataset: str | None = None, val_dataset: str | None = None
) -> Sweep:
    """Reads a file and expands its grid.

    Args:
        overrides: key=value for all rows, from the command line.
        train_dataset, val_dataset: data strings in place of those of the file.

    Raises:
        OSError: the file or its base cannot be read.
        ValueError: the file is not a sweep; the message names it.
    """
    content = read_yaml(path, resolve=True)
    if unknown := content.keys() - set(SECTIONS):
        raise ValueError(
            f"{path}: unknown section {sorted(map(str, unknown))[0]!r}; known are {', '.join(SECTIONS)}. Settings go "
            "to 'overrides', as key=value"
        )
    base = content.get("base")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} needs 'base', the name of a recipe or the path of a YAML file, got {base!r}")
    points = [*expand(path, _table(path, content, "grid")), *_named_rows(path, _table(path, content, "rows"))]
    if not points:
        raise ValueError(f"{path} has no rows; give 'grid', a key with values on each line, or 'rows'")
    data = _table(path, content, "data")
    train, val = train_dataset or data.get("train"), val_dataset or data.get("val")
    shared = [*([f"train.dataset_path={train}"] if train else []), *_words(path, content, "overrides"), *overrides]
    _refuse_double(path, overrides, (word for _, own in points for word in own))
    recipe = str(find_recipe(base, path.parent, f"{path}: base:"))
    rows = [
        Row(label, seed, recipe, tuple(own), tuple(shared)) for label, own in points for seed in _seeds(path, content)
    ]
    require_distinct(path, rows)
    return Sweep(path, rows, with_data(_evaluations(path, content), train, val))


def expand(path: Path, grid: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Returns label and overrides of every combination; the last axis varies fastest. No axis: no combination.

    An axis is a setting with a list of values, or a name with a table of levels, each a list of overrides.
    """
    if not grid:
        return []
    last_words = [str(axis).rpartition(".")[2] for axis in grid]
    axes = []
    for axis, last_word in zip(grid, last_words, strict=True):
        name, levels = last_word if last_words.count(last_word) == 1 else axis, grid[axis]
        if not isinstance(levels, (list, dict)) or not levels:
            raise ValueError(
                f"{path}: grid: {axis} must be a list of values, or a table of levels with a list of key=value each, "
                f"got {levels!r}"
            )
        if isinstance(levels, dict):
            axes.append([(f"{name}={level}", _words(path, levels, level)) for level in levels])
        else:
            axes.append([(f"{name}={_text(value)}", [f"{axis}={_text(value)}"]) for value in levels])
    return [
        (", ".join(label for label, _ in point), [word for _, words in point for word in words])
        for point in itertools.product(*axes)
    ]


def require_distinct(path: Path, rows: Sequence[Row]) -> None:
    """Raises ValueError if two rows would write to one folder."""
    found: dict[str, Row] = {}
    for row in rows:
        other = found.setdefault(row.folder_name, row)
        if other is not row:
            raise ValueError(
                f"{path}: the rows {other.label!r} and {row.label!r} with seed {row.seed} would both go to the folder "
                f"{row.folder_name}; rename or remove one"
            )


def with_data(
    evaluations: Mapping[str, dict[str, Any] | None], train: str | None, val: str | None
) -> dict[str, dict[str, Any] | None]:
    """Adds the data to the flags of evaluations that name no data of their own."""
    data = {key: value for key, value in (("train-dataset", train), ("val-dataset", val)) if value}
    return {
        str(name): data | (flags or {}) if isinstance(flags, dict | None) else flags
        for name, flags in evaluations.items()
    }


def _table(path: Path, content: Mapping[str, Any], section: str) -> dict[str, Any]:
    table = content.get(section) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {section!r} must be names or keys with what they stand for, got {table!r}")
    return table


def _words(path: Path, content: Mapping[str, Any], name: str) -> list[str]:
    words = content.get(name) or []
    if not isinstance(words, list) or not all(isinstance(word, str) and "=" in word for word in words):
        raise ValueError(f"{path}: {name} must be a list of key=value, such as [optim.steps=1000], got {words!r}")
    return words


def _named_rows(path: Path, rows: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [(str(name), _words(path, rows, name)) for name in rows]


def _seeds(path: Path, content: Mapping[str, Any]) -> list[int]:
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: seeds must be a list of whole numbers from 0, such as [0, 1, 2], got {seeds!r}")
    return seeds


def _evaluations(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    evaluations = _table(path, content, "evaluations")
    if not evaluations:
        raise ValueError(f"{path} needs 'evaluations', such as knn: {{nb_knn: 20}}; without one there is no table")
    for name in evaluations:
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", str(name)):
            raise ValueError(f"{path}: evaluation {name!r} is to name a folder; use letters, digits and _ . + -")
    return evaluations


def _refuse_double(path: Path, overrides: Iterable[str], own: Iterable[str]) -> None:
    keys = {SEED, *(word.partition("=")[0] for word in own)}
    for word in overrides:
        if (key := word.partition("=")[0]) in keys:
            where = "seeds" if key == SEED else "grid or rows"
            raise ValueError(f"{word}: {path} sets {key} itself, row by row; change its {where} instead")


def _text(value: Any) -> str:
    """A value as YAML that `key=value` reads back."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
