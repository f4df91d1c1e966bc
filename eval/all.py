"""A list of evaluations over one or many encoders, one after the other or as jobs, and one table of all numbers."""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2_eq.evaluation.summary import Entry, read_numbers, write_summary
from dinov2_eq.logging import check_writable, setup_logging
from dinov2_eq.report import render_evaluations

PROGRAMS = ("knn", "linear", "logreg", "equivariance")
COMMAND = "command.json"  # beside the results: what made them
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not done yet, and exits with 2 where an evaluation failed; the others are not affected.

    Raises:
        ValueError: a list that cannot be read, with an unknown program or without encoders.
    """
    args = build_parser().parse_args(argv)
    tasks = read_list(Path(args.config_file), args.output_dir)
    check_writable(args.output_dir)
    setup_logging()
    entries = []
    for number, task in enumerate(tasks, start=1):
        logger.info("%d of %d: %s of %s", number, len(tasks), task.evaluation, task.encoder)
        entries.append(carry_out(task, args.submit))
        summary = write_summary(args.output_dir, entries)
        (args.output_dir / PAGE_NAME).write_text(render_evaluations(*summary), encoding="utf-8")
    print(summary.markdown())
    print(args.output_dir / PAGE_NAME)
    if any(entry.state == "failed" for entry in entries):
        sys.exit(2)


def read_list(path: Path, output_dir: Path) -> list[Task]:
    """Every evaluation of every encoder that a YAML file lists.

    encoders: {NAME: SOURCE, ...}; evaluations: {NAME: {program: knn, FLAG: VALUE, ...}, ...}, where `program` may be
    left out if it is the name, a list is several values, and true is a flag without a value.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config-file {path}: no such file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    for section in ("encoders", "evaluations"):
        if not isinstance(content, dict) or not isinstance(content.get(section), dict) or not content[section]:
            raise ValueError(f"{path} needs the section {section!r}, with a name and what it stands for on each line")
    if unknown := content.keys() - {"encoders", "evaluations"}:
        raise ValueError(f"{path}: unknown section {sorted(unknown)[0]!r}; known are encoders, evaluations")
    tasks = []
    for encoder, source in content["encoders"].items():
        for evaluation, flags in content["evaluations"].items():
            flags = dict(flags or {})
            program = flags.pop("program", evaluation)
            if program not in PROGRAMS:
                raise ValueError(
                    f"{path}: evaluation {evaluation!r} has no program; give program: {' | '.join(PROGRAMS)}"
                )
            folder = output_dir / str(encoder) / str(evaluation)
            given = ["--encoder", str(source), "--output-dir", str(folder), *as_flags(flags)]
            tasks.append(Task(str(encoder), str(evaluation), program, given, folder))
    return tasks


def as_flags(flags: dict[str, Any]) -> list[str]:
    """{"nb_knn": [10, 20], "card": True} -> ["--nb_knn", "10", "20", "--card"]"""
    argv: list[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return argv


def carry_out(task: Task, submit: str | None) -> Entry:
    """Runs or submits the evaluation, unless its results are there already and the same command made them."""
    made_by = task.folder / COMMAND
    command = [task.program, *task.argv]
    numbers = read_numbers(task.folder)
    if numbers and made_by.exists() and json.loads(made_by.read_text()) == command:
        return Entry(task.encoder, task.evaluation, "done", numbers)
    for stale in task.folder.glob("results_eval_*.json"):
        stale.unlink()
    task.folder.mkdir(parents=True, exist_ok=True)
    made_by.write_text(json.dumps(command))
    words = ["eval", *command] if submit is None else ["submit", task.program, *submit.split(), *task.argv]
    log = task.folder / LOG
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-m", "dinov2_eq.run.cli", *words], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        lines = log.read_text().strip().splitlines()
        note = f"{lines[-1] if lines else f'exit code {code}'} (see {log})"
        logger.error("%s of %s failed: %s", task.evaluation, task.encoder, note)
        return Entry(task.encoder, task.evaluation, "failed", {}, note)
    numbers = read_numbers(task.folder)
    return Entry(task.encoder, task.evaluation, "done" if numbers else "submitted", numbers)


if __name__ == "__main__":
    main()
