"""A list of evaluations over one or many encoders, one after the other or as jobs, and one table of all numbers."""

import argparse
import importlib
import io
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.config.yaml_files import read_yaml
from dinov2_eq.distributed.signals import stops_raise
from dinov2_eq.evaluation import EVALUATIONS
from dinov2_eq.evaluation.command_line import encoder_of
from dinov2_eq.evaluation.encoder import find_checkpoint
from dinov2_eq.evaluation.programs import Programs, last_line
from dinov2_eq.evaluation.summary import Entry, read_numbers, write_summary
from dinov2_eq.files import check_writable, read_json, replace_text
from dinov2_eq.logging import setup_logging
from dinov2_eq.report import render_evaluations

FEATURES = ".features"  # shared by the evaluations of an encoder, removed at the end
COMMAND = "command.json"  # beside the results: what made them, or what was submitted to make them
LOG = "log.txt"
PAGE_NAME = "summary.html"

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """One evaluation of one encoder, with the folder of its results."""

    encoder: str
    evaluation: str
    program: str
    argv: list[str]
    folder: Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq eval all", description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="encoders and evaluations, see docs")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="results and tables")
    parser.add_argument(
        "--submit",
        metavar="FLAGS",
        help="a job for each evaluation, with these flags of 'dinov2-eq submit', such as '--partition gpu'; the same "
        "command later makes the table of what is done",
    )
    parser.add_argument("--resubmit", action="store_true", help="start again what was submitted and has no results")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs unfinished evaluations; exits with 2 if one failed, after running the others.

    Raises:
        ValueError: a list that cannot be read, with an unknown program or flag, or without encoders; nothing was run.
        Stopped: SIGTERM or SIGHUP.
    """
    args = build_parser().parse_args(argv)
    submit = None if args.submit is None else split_words(args.submit)
    tasks = read_list(Path(args.config_file), args.output_dir)
    for task in tasks:
        check_flags(Path(args.config_file), task)
    check_writable(args.output_dir)
    setup_logging()
    entries = []
    with (
        stops_raise("the same command goes on with the evaluations that are not done"),
        shared_features({task.folder.parent for task in tasks}),
        Programs() as programs,
    ):
        for number, task in enumerate(tasks, start=1):
            logger.info("%d of %d: %s of %s", number, len(tasks), task.evaluation, task.encoder)
            entries.append(carry_out(task, submit, args.resubmit, programs))
            summary = write_summary(args.output_dir, entries)
            replace_text(args.output_dir / PAGE_NAME, render_evaluations(*summary))
    print(summary.markdown())
    print(args.output_dir / PAGE_NAME)
    if any(entry.state == "failed" for entry in entries):
        sys.exit(2)


@contextmanager
def shared_features(folders: Collection[Path]) -> Iterator[None]:
    """Removes cached features before and after, since data may change between calls."""

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder / FEATURES, ignore_errors=True)

    remove()
    try:
        yield
    finally:
        remove()


def split_words(text: str) -> list[str]:
    """Splits flags as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--submit {text!r} cannot be read: {error}") from None


def read_list(path: Path, output_dir: Path) -> list[Task]:
    """Returns every evaluation of every encoder listed in a YAML file.

    encoders: {NAME: SOURCE, ...}; evaluations: {NAME: {program: knn, FLAG: VALUE, ...}, ...}, where `program` may be
    left out if it is the name, a list is several values, true is a flag without a value and false is --no-FLAG.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config-file {path}: {'a folder' if path.is_dir() else 'no such file'}")
    content = read_yaml(path, resolve=True)
    for section in ("encoders", "evaluations"):
        if not isinstance(content.get(section), dict) or not content[section]:
            raise ValueError(f"{path} needs the section {section!r}, with a name and what it stands for on each line")
    if unknown := content.keys() - {"encoders", "evaluations"}:
        raise ValueError(f"{path}: unknown section {sorted(map(str, unknown))[0]!r}; known are encoders, evaluations")
    for name in (*content["encoders"], *content["evaluations"]):
        if str(name) in ("", ".", "..") or "/" in str(name):
            raise ValueError(f"{path}: {str(name)!r} is to name a folder of results, so it may not be a path")
    tasks = []
    for encoder, source in content["encoders"].items():
        if not isinstance(source, str) or not source:
            raise ValueError(f"{path}: encoder {encoder!r} must be one source, such as a run folder, got {source!r}")
        tasks += tasks_of(path, str(encoder), source, content["evaluations"], output_dir / str(encoder))
    return tasks


def tasks_of(
    path: Path, encoder: str, source: str, evaluations: Mapping[str, dict[str, Any] | None], folder: Path
) -> list[Task]:
    """Returns the evaluations of one encoder, whose results go to a subfolder each.

    Args:
        path: of the list, for messages.
        evaluations: the section of the list.

    Raises:
        ValueError: an evaluation is not a table of flags, or has no program.
    """
    tasks = []
    for evaluation, given in evaluations.items():
        if not isinstance(given, dict | None):
            raise ValueError(f"{path}: evaluation {evaluation!r} must be flags and their values, got {given!r}")
        flags = dict(given or {})
        program = flags.pop("program", evaluation)
        if program not in EVALUATIONS:
            raise ValueError(
                f"{path}: evaluation {evaluation!r} has no program; give program: {' | '.join(EVALUATIONS)}"
            )
        argv = ["--encoder", source, "--output-dir", str(folder / str(evaluation)), *as_flags(flags)]
        tasks.append(Task(encoder, str(evaluation), program, argv, folder / str(evaluation)))
    return tasks


def as_flags(flags: Mapping[str, Any]) -> list[str]:
    """{"nb_knn": [10, 20], "card": True, "random-init": False} -> --nb_knn 10 20 --card --no-random-init"""
    argv: list[str] = []
    for name, value in flags.items():
        argv.append(f"--no-{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            argv += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return argv


def check_flags(path: Path, task: Task) -> None:
    """Raises ValueError for flags that the program does not take or that the list sets itself."""
    parser = importlib.import_module(EVALUATIONS[task.program].module).build_parser()
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args = parser.parse_args(task.argv)
    except SystemExit:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(
            f"{path}: evaluation {task.evaluation!r}: {reason}; dinov2-eq eval {task.program} --help lists the flags"
        ) from None
    if encoder_of(args) not in (task.argv[1], [task.argv[1]]) or args.output_dir != task.folder or args.dry_run:
        raise ValueError(
            f"{path}: evaluation {task.evaluation!r} gives a flag that the list sets by itself, or that keeps it from "
            "having results: leave out encoder, pretrained-weights, output-dir and dry-run"
        )


def carry_out(task: Task, submit: Sequence[str] | None, resubmit: bool, programs: Programs) -> Entry:
    """Runs or submits the evaluation, unless the same command already ran on the same files.

    Then its results count, or what was submitted is waited for, unless `resubmit`. Results of another command stay
    until there are new ones, or until a job is to write them.
    """
    made_by, log = task.folder / COMMAND, task.folder / LOG
    made_from = {"command": [task.program, *task.argv], "files": stamps(task.argv)}
    before = read_record(made_by)
    numbers = read_results(task.folder)
    if numbers and before in (made_from | {"submitted": False}, made_from | {"submitted": True}):
        return Entry(task.encoder, task.evaluation, "done", numbers)
    if before == made_from | {"submitted": True} and not resubmit:
        return Entry(task.encoder, task.evaluation, "submitted", {}, f"no results yet, see {log}; or --resubmit")
    stale = {path: path.stat().st_mtime_ns for path in task.folder.glob("results_eval_*.json")}
    made_by.unlink(missing_ok=True)
    if submit is not None:
        for path in stale:
            path.unlink()
    task.folder.mkdir(parents=True, exist_ok=True)
    words = ["submit", task.program, *(submit or []), *task.argv]
    if submit is None:
        words = ["eval", task.program, "--features-dir", str(task.folder.parent / FEATURES), *task.argv]
    if code := programs.run(words, log):
        if before is not None and submit is None:
            replace_text(made_by, json.dumps(before))
        note = last_line(log, code)
        logger.error("%s of %s failed: %s", task.evaluation, task.encoder, note)
        return Entry(task.encoder, task.evaluation, "failed", {}, note)
    for path, written_ns in stale.items():
        if path.exists() and path.stat().st_mtime_ns == written_ns:
            path.unlink()
    numbers = read_results(task.folder)
    if not numbers and submit is None:
        return Entry(task.encoder, task.evaluation, "failed", {}, f"it left no results (see {log})")
    replace_text(made_by, json.dumps(made_from | {"submitted": submit is not None}))
    return Entry(task.encoder, task.evaluation, "done" if numbers else "submitted", numbers)


def read_results(folder: Path) -> dict[str, float]:
    """Returns the numbers of an evaluation; none if a results file is damaged, so that it is rerun."""
    try:
        return read_numbers(folder)
    except ValueError as error:
        logger.warning("%s", error)
        return {}


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the record that `carry_out` wrote; None if unreadable, so that the evaluation is rerun."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def stamps(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns file, size and modification time for each path in a command; other words are skipped.

    Class mappings and heads may be written anew, and a run's newest teacher is soon another one.
    """
    found = {}
    for word in words:
        with suppress(OSError):
            file = find_checkpoint(Path(word.removeprefix("random:"))).resolve()
            found[word] = {"file": str(file), "bytes": file.stat().st_size, "written_ns": file.stat().st_mtime_ns}
    return found


if __name__ == "__main__":
    main()
