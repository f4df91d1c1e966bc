"""Many trainings that differ in a few settings, the same evaluations of each, and one table: `dinov2-eq sweep`.

The same command goes on: a finished row is skipped, and one that was interrupted resumes.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from dinov2_eq.config.load import find_recipe, load_config, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.distributed.signals import stops_raise
from dinov2_eq.eval.all import Task, carry_out, check_flags, shared_features, split_words, tasks_of
from dinov2_eq.evaluation.command_line import positive
from dinov2_eq.evaluation.programs import Programs, last_line
from dinov2_eq.evaluation.summary import Entry
from dinov2_eq.files import check_writable, replace_text
from dinov2_eq.logging import setup_logging
from dinov2_eq.run.sweep_file import Row, Sweep, read_sweep
from dinov2_eq.run.sweep_table import Outcome, write_tables
from dinov2_eq.train import run_folder

SUBMITTED = "submitted.yaml"  # config of the job that is to train a row
LOG = "train.txt"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

logger = logging.getLogger(__name__)


class How(NamedTuple):
    """How the rows are run."""

    jobs: int = 1  # at a time, on this host
    submit: list[str] | None = None  # flags of `dinov2-eq submit`; None: run here
    resubmit: bool = False


class Planned(NamedTuple):
    """A row that passed the checks."""

    row: Row
    config: Config
    folder: Path
    tasks: list[Task]

    def is_trained(self) -> bool:
        return (self.folder / f"eval/training_{self.config.optim.steps}/teacher_checkpoint.pth").is_file()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq sweep", description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="the sweep: a file, or a packaged one")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that every command with rows has."""
    add = parser.add_argument
    add("--output-dir", required=True, type=Path, metavar="DIR", help="a folder for each row, table and plot")
    add("--train-dataset", metavar="DATA", help="data string, for training and evaluations")
    add("--val-dataset", metavar="DATA", help="data string, for evaluations")
    add("--jobs", type=positive, default=1, metavar="N", help="rows at a time, with one thread each if N > 1")
    add(
        "--submit",
        metavar="FLAGS",
        help="a job for each training, then for each evaluation, with these flags of 'dinov2-eq submit', such as "
        "'--partition gpu'; repeat the command to submit what comes next and to make the table of what is done",
    )
    add("--resubmit", action="store_true", help="start again what was submitted and is not finished")
    add("--dry-run", action="store_true", help="check everything, list the rows and exit")
    add("overrides", nargs="*", metavar="key=value", help="config overrides for all rows, anywhere on the line")


def how_of(args: argparse.Namespace) -> How:
    return How(args.jobs, None if args.submit is None else split_words(args.submit), args.resubmit)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs unfinished rows; exits with 2 if one failed, after running the others.

    Raises:
        ValueError, OSError: the sweep cannot be read, a row cannot run, or its settings have changed; nothing was run.
        Stopped: SIGTERM or SIGHUP.
    """
    args = build_parser().parse_intermixed_args(argv)
    path = find_recipe(args.config_file, kind="sweep")
    sweep = read_sweep(path, args.overrides, args.train_dataset, args.val_dataset)
    planned = plan(sweep, args.output_dir)
    if args.dry_run:
        print(listing(planned))
        return
    outcomes = carry_out_sweep(planned, args.output_dir, how_of(args))
    print((args.output_dir / "sweep.md").read_text())
    print(args.output_dir / "sweep.md")
    if any(outcome.state == "failed" for outcome in outcomes):
        sys.exit(2)


def plan(sweep: Sweep, output_dir: Path) -> list[Planned]:
    """Loads the config of every row, and checks it and the flags of the evaluations.

    Raises:
        ValueError, OSError: a row cannot run, or the run in its folder has other settings.
    """
    planned = []
    for row in sweep.rows:
        folder = output_dir / row.folder_name
        config = config_of(sweep.path, row)
        tasks = tasks_of(sweep.path, row.folder_name, str(folder), sweep.evaluations, folder)
        planned.append(Planned(row, config, folder, tasks))
    for task in planned[0].tasks:  # those of the others differ only in their folder
        check_flags(sweep.path, task)
    for each in planned:
        require_same_settings(each)
    return planned


def config_of(path: Path, row: Row) -> Config:
    """Loads the config of a row; errors name the file at `path` and the row."""
    try:
        return load_config(row.recipe, row.overrides, lambda sentence: None)  # training says it
    except ValueError as error:
        raise ValueError(f"{path}: row {row.label!r}: {error}") from None


def require_same_settings(planned: Planned) -> None:
    """Raises ValueError if the run in the folder of a row, or the job that was submitted for it, has other settings."""
    for name in (run_folder.CONFIG, SUBMITTED):
        path = planned.folder / name
        if changes := run_folder.changed_settings(path, planned.config):
            raise ValueError(
                f"The row {planned.row.label!r} is in {planned.folder} with other settings: "
                f"{'; '.join(changes.values())}. Give the old values, another --output-dir, or remove that folder"
            )


def listing(planned: Sequence[Planned]) -> str:
    """One line for each row: how far it is, its folder and its settings."""
    lines = [
        f"{'trained' if each.is_trained() else 'to train':<9} {each.row.folder_name}  {' '.join(each.row.own)}"
        for each in planned
    ]
    return "\n".join([*lines, f"{len(planned)} rows of {len(planned[0].tasks)} evaluations"])


def carry_out_sweep(planned: Sequence[Planned], output_dir: Path, how: How) -> list[Outcome]:
    """Trains and evaluates every row that is not done, and writes the tables after each; returns the rows in order."""
    check_writable(output_dir)
    setup_logging()
    if not planned:
        write_tables(output_dir, [])
    found: dict[str, Outcome] = {}

    def work(each: Planned) -> Outcome:
        return carry_out_row(each, how, programs)

    with (
        stops_raise("the same command goes on"),
        shared_features([each.folder for each in planned]),
        Programs(ONE_THREAD if how.jobs > 1 else None) as programs,
        closing(in_turn_or_together(work, planned, how.jobs, programs)) as outcomes,
    ):
        for number, outcome in enumerate(outcomes, start=1):
            logger.info("%d of %d rows: %s %s", number, len(planned), outcome.folder.name, outcome.state)
            found[outcome.folder.name] = outcome
            write_tables(output_dir, [found[each.folder.name] for each in planned if each.folder.name in found])
    return [found[each.folder.name] for each in planned]


def in_turn_or_together(
    work: Callable[[Planned], Outcome], planned: Sequence[Planned], jobs: int, programs: Programs
) -> Iterator[Outcome]:
    """Yields the outcome of each row as soon as it is there; closing it ends the programs that run."""
    if jobs == 1:
        yield from map(work, planned)
        return
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(work, each) for each in planned]):
                yield future.result()
        except BaseException:  # also GeneratorExit
            pool.shutdown(wait=False, cancel_futures=True)
            programs.end()  # or the pool would wait for them
            raise


def carry_out_row(planned: Planned, how: How, programs: Programs) -> Outcome:
    """Trains a row unless it is trained, then evaluates it; what cannot be done now is said in the outcome."""
    row, folder = planned.row, planned.folder
    if not planned.is_trained():
        state, note = train(planned, how, programs)
        if state != "done":
            return Outcome(row, folder, state, note, [])
    entries: list[Entry] = [carry_out(task, how.submit, how.resubmit, programs) for task in planned.tasks]
    states = {entry.state for entry in entries}
    state = next((each for each in ("failed", "submitted") if each in states), "done")
    note = "; ".join(f"{entry.evaluation}: {entry.state} {entry.note}" for entry in entries if entry.state != "done")
    return Outcome(row, folder, state, note, entries)


def train(planned: Planned, how: How, programs: Programs) -> tuple[str, str]:
    """Trains a row, or submits its training; returns "done", "submitted" or "failed", and why."""
    row, folder = planned.row, planned.folder
    if how.submit is not None and (folder / SUBMITTED).is_file() and not how.resubmit:
        return "submitted", f"training is not finished, see {folder / LOG}; or --resubmit"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--config-file", row.recipe, "--output-dir", str(folder), *row.overrides]
    words = ["train", *words] if how.submit is None else ["submit", "train", *how.submit, *words]
    logger.info("%s: %s", folder.name, "training" if how.submit is None else "submitting")
    if code := programs.run(words, folder / LOG):
        note = last_line(folder / LOG, code)
        logger.error("%s failed: %s", folder.name, note)
        return "failed", note
    if how.submit is not None:
        replace_text(folder / SUBMITTED, to_yaml(planned.config))
    if planned.is_trained():  # `--cluster debug` trains at once
        return "done", ""
    if how.submit is not None:
        return "submitted", f"see {folder / LOG}"
    return "failed", f"it left no teacher of the last step (see {folder / LOG})"


if __name__ == "__main__":
    main()
