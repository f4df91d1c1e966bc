"""Makes a table of a paper again: `dinov2-eq reproduce paper-b-cifar10 --budget 45 --output-dir DIR`.

It trains our rows for the published ones as a sweep, and writes published numbers, ours and the conditions side by
side. The same command goes on with what is not done.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dinov2_eq.config.checks import LENGTHS
from dinov2_eq.config.load import find_recipe
from dinov2_eq.evaluation.command_line import positive
from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import as_written, check_types, read_json, replace_text
from dinov2_eq.report.figures import as_svg
from dinov2_eq.report.reproduction import Compared, as_html, as_markdown, plot
from dinov2_eq.run.published import BUDGET, PAPER, PaperTable, System, read_table
from dinov2_eq.run.sweep import add_flags, carry_out_sweep, config_of, how_of, listing, plan
from dinov2_eq.run.sweep_file import Row, Sweep, require_distinct, with_data
from dinov2_eq.train.timing import seconds_per_step, settings_for

MIN_STEPS = 50
BUDGET_FILE = "budget.json"
NAME = "reproduction"
# Borders that a number is read with, the first that a task has; colour and blur draw none.
BORDERS = {"black": ("zeros", "none"), "masked": ("masked",), "real": ("canvas", "none")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq reproduce", description=__doc__)
    parser.add_argument(
        "table", help="a packaged table, such as paper-b-cifar10 (all are in docs/sweeps.md), or a YAML file"
    )
    parser.add_argument(
        "--budget",
        required=True,
        type=budget,
        metavar="MINUTES|paper",
        help="minutes of training for each row, as measured here: all rows get the steps that the slowest one makes in "
        "it; or the paper's own schedule and data",
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each row; default: 1")
    add_flags(parser)
    return parser


def budget(text: str) -> float | None:
    """Parses minutes, or `paper` as None."""
    if text == PAPER:
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"must be minutes above 0, or {PAPER}, got {text}")
    return minutes


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the rows that are not done and writes the table; exits with 2 if one failed, after running the others.

    Raises:
        ValueError, OSError: a row cannot run or has changed, or the budget is too small; nothing was trained.
        Stopped: SIGTERM or SIGHUP.
    """
    args = build_parser().parse_intermixed_args(argv)
    path = find_recipe(args.table, flag="reproduce", kind="reproduce")
    table = read_table(path, PAPER if args.budget is None else BUDGET)
    sweep = sweep_of(table, args)
    if args.budget is not None and sweep.rows and not args.dry_run:
        if args.submit is not None:
            raise ValueError(
                f"--submit with --budget {args.budget:g}: minutes are measured on this machine, not on that of the "
                "jobs; give --budget paper, or run this command inside a job"
            )
        sweep = sweep._replace(rows=with_budget(sweep, args.budget, args.output_dir, args.jobs))
    planned = plan(sweep, args.output_dir) if sweep.rows else []
    if args.dry_run:
        print(listing(planned) if planned else "no row of ours", *open_rows(table), sep="\n")
        return
    outcomes = carry_out_sweep(planned, args.output_dir, how_of(args))
    print(write(table, args.output_dir, "paper" if args.budget is None else f"{args.budget:g} minutes for each row"))
    if any(outcome.state == "failed" for outcome in outcomes):
        sys.exit(2)


def sweep_of(table: PaperTable, args: argparse.Namespace) -> Sweep:
    """Returns our rows as a sweep; raises ValueError if an override would undo what the table or the budget sets."""
    train = args.train_dataset or table.data.get("train")
    shared = (f"train.dataset_path={train}", *args.overrides)
    rows = [
        Row(system.name, seed, system.recipe, tuple(system.settings), shared)
        for system in table.systems
        if not system.open
        for seed in range(args.seeds)
    ]
    given = {word.partition("=")[0] for word in args.overrides}
    by_budget = {"optim.steps", *LENGTHS} if args.budget is not None else set()
    own = {word.partition("=")[0] for row in rows for word in row.own} | {"train.seed"}
    if double := sorted(given & (by_budget | own)):
        what = "--budget" if double[0] in by_budget else table.path
        raise ValueError(f"{double[0]} cannot be given here: {what} sets it, row by row")
    require_distinct(table.path, rows)
    return Sweep(table.path, rows, with_data(table.evaluations, train, args.val_dataset or table.data.get("val")))


def with_budget(sweep: Sweep, minutes: float, folder: Path, jobs: int) -> list[Row]:
    """Gives every row the number of steps that the slowest makes in `minutes`; the first call in a folder measures.

    Raises:
        ValueError: these are less than `MIN_STEPS`, or the folder was begun with another budget.
    """
    path = folder / BUDGET_FILE
    configs = {row.folder_name: config_of(sweep.path, row) for row in sweep.rows}
    if not path.is_file():
        if jobs > 1:
            torch.set_num_threads(1)  # as the rows will have
        seconds = {}
        for row in sweep.rows:
            if row.seed == 0:
                seconds[row.label] = seconds_per_step(configs[row.folder_name])
                print(f"{row.label}: {seconds[row.label]:.3f} s a step", flush=True)
        slowest = max(seconds, key=seconds.__getitem__)
        steps = int(60 * minutes / seconds[slowest])
        if steps < MIN_STEPS:
            raise ValueError(
                f"--budget {minutes:g} is too small: {slowest!r} makes {steps} steps in it, of {seconds[slowest]:.2f} "
                f"s each, and less than {MIN_STEPS} say nothing; give --budget "
                f"{1.1 * MIN_STEPS * seconds[slowest] / 60:.2g} or more"
            )
        write_results(path, {"minutes": minutes, "steps": steps, "seconds_per_step": seconds})
    begun = read_json(path)
    with as_written(path):
        check_types([begun["minutes"], begun["steps"]], float | int)
    if begun["minutes"] != minutes:
        raise ValueError(
            f"{folder} was begun with --budget {begun['minutes']:g}, not {minutes:g}; give that, or another "
            "--output-dir"
        )
    return [row._replace(own=(*row.own, *settings_for(configs[row.folder_name], begun["steps"]))) for row in sweep.rows]


def open_rows(table: PaperTable) -> list[str]:
    return [f"open      {system.name}: {system.open}" for system in table.systems if system.open]


def write(table: PaperTable, folder: Path, budget: str) -> str:
    """Writes reproduction.json, .md, .html and .svg from the sweep's results; returns the Markdown."""
    results = read_json(folder / "sweep.json")
    with as_written(folder / "sweep.json"):
        runs = [row for row in results["rows"] if "r2" in row]
        rows = [compare(system, [run for run in runs if run["row"] == system.name], table) for system in table.systems]
        rows += [
            Compared(f"untrained {row['arch']}", {}, "", ["random weights"], numbers_of([row], table))
            for row in results["untrained"]
        ]
        conditions = conditions_of(table, runs, budget)
    write_results(
        folder / f"{NAME}.json",
        {
            "title": table.title,
            "budget": budget,
            "conditions": [dict(zip(("condition", "theirs", "ours"), each, strict=True)) for each in conditions],
            "rows": [row._asdict() for row in rows],
        },
    )
    text = as_markdown(table.title, rows, conditions)
    replace_text(folder / f"{NAME}.md", text)
    replace_text(folder / f"{NAME}.html", as_html(table.title, rows, conditions))
    replace_text(folder / f"{NAME}.svg", as_svg(plot(rows)))
    return text


def compare(system: System, runs: Sequence[Mapping[str, Any]], table: PaperTable) -> Compared:
    """A published row beside the runs for it."""
    published = dict(system.published)
    if published.keys() == table.columns.keys():
        published["mean"] = mean(published.values())
    notes = [system.note] if system.note else []
    if system.open:
        notes.append(f"open: {system.open}")
    elif not runs:
        notes.append("not done yet")
    return Compared(system.name, published, system.source, notes, numbers_of(runs, table))


def numbers_of(runs: Sequence[Mapping[str, Any]], table: PaperTable) -> dict[str, list[dict[str, float]]]:
    """R2 of each column, their mean and k-NN of each run, by the border that R2 is read with."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in BORDERS}
    for run in runs:
        for kind, borders in BORDERS.items():
            numbers = {}
            for column, task in table.columns.items():
                scores = [run["r2"][f"{task}/{border}"] for border in borders if f"{task}/{border}" in run["r2"]]
                if scores:
                    numbers[column] = scores[0]["pooled"]
            if numbers.keys() == table.columns.keys():
                numbers["mean"] = mean(numbers.values())
            if kind == "real" and (accuracies := run.get("knn_top1")):
                k = max(accuracies, key=int)
                numbers[f"{k}-NN %"] = accuracies[k]
            if numbers:
                found[kind].append(numbers)
    return found


def conditions_of(table: PaperTable, runs: Sequence[Mapping[str, Any]], budget: str) -> list[tuple[str, str, str]]:
    """What each condition was in the paper and in our runs."""

    def each(text: str) -> str:
        return "; ".join(dict.fromkeys(text.format_map(run) for run in runs)) or "no run yet"

    borders = "; ".join(dict.fromkeys(run["border"] for run in runs if "border" in run))
    ours = {
        "backbone": each("{arch} of depth {depth}, patches of {patch_size}, images of {image_size} pixels"),
        "data": each("{data}"),
        "schedule": each("{steps} steps of {batch_size} images"),
        "border": f"in training: {borders or 'no run yet'}; R2 is read with black, masked and real ones",
        "probe": json.dumps(table.evaluations.get("equivariance") or {}),
        "budget": budget,
        "device": each("{device}"),
        "seeds": "; ".join(dict.fromkeys(str(run["seed"]) for run in runs)) or "no run yet",
    }
    return [(name, table.theirs.get(name, ""), ours.get(name, "")) for name in dict.fromkeys([*table.theirs, *ours])]


if __name__ == "__main__":
    main()
