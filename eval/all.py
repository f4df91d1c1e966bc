"""A list of evaluations over one or many encoders, one after the other or as jobs, and one table of all numbers."""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2_eq.evaluation.encoder import find_checkpoint
from dinov2_eq.evaluation.summary import Entry, read_numbers, write_summary
from dinov2_eq.files import check_writable
from dinov2_eq.logging import setup_logging
from dinov2_eq.report import render_evaluations

PROGRAMS = ("knn", "linear", "logreg", "equivariance")
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
        entries.append(carry_out(task, args.submit, args.resubmit))
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


def carry_out(task: Task, submit: str | None, resubmit: bool) -> Entry:
    """Runs or submits the evaluation, unless the same command was given before for the same files.

    Then its results count, or what was submitted is waited for, unless `resubmit`.
    """
    made_by, log = task.folder / COMMAND, task.folder / LOG
    made_from = {"command": [task.program, *task.argv], "files": stamps(task.argv)}
    before = json.loads(made_by.read_text()) if made_by.exists() else None
    numbers = read_numbers(task.folder)
    if numbers and before in (made_from | {"submitted": False}, made_from | {"submitted": True}):
        return Entry(task.encoder, task.evaluation, "done", numbers)
    if before == made_from | {"submitted": True} and not resubmit:
        return Entry(task.encoder, task.evaluation, "submitted", {}, f"no results yet, see {log}; or --resubmit")
    for stale in [made_by, *task.folder.glob("results_eval_*.json")]:
        stale.unlink(missing_ok=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    words = ["eval", task.program] if submit is None else ["submit", task.program, *submit.split()]
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-m", "dinov2_eq.run.cli", *words, *task.argv], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        lines = log.read_text().strip().splitlines()
        note = f"{lines[-1] if lines else f'exit code {code}'} (see {log})"
        logger.error("%s of %s failed: %s", task.evaluation, task.encoder, note)
        return Entry(task.encoder, task.evaluation, "failed", {}, note)
    made_by.write_text(json.dumps(made_from | {"submitted": submit is not None}))
    numbers = read_numbers(task.folder)
    return Entry(task.encoder, task.evaluation, "done" if numbers else "submitted", numbers)


def stamps(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Which file each path in a command means today, with its size and time; what is no path has none.

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
