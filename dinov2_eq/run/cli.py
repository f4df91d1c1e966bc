"""The console program `dinov2-eq`."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from dinov2_eq import __version__
from dinov2_eq.evaluation import EVALUATIONS
from dinov2_eq.run.outcome import exit_code

COMMANDS = {
    "train": ("dinov2_eq.train.train", "pretrain a backbone"),
    "submit": ("dinov2_eq.run.submit", "run train or an evaluation as a job on SLURM, or in processes here"),
    **{f"eval {name}": tuple(program) for name, program in EVALUATIONS.items()},
    "eval all": ("dinov2_eq.eval.all", "a list of evaluations over many encoders, and one table"),
    "sweep": ("dinov2_eq.run.sweep", "trainings that differ in a few settings, evaluated, and one table"),
    "choose-transforms": (
        "dinov2_eq.run.choose_transforms",
        "which transforms to keep and which to be invariant to, on your images, by short runs",
    ),
    "reproduce": ("dinov2_eq.run.reproduce", "a table of the papers: published numbers and ours, side by side"),
    "doctor": ("dinov2_eq.tools.doctor", "what this machine, its network and a config need before a run"),
    "export": ("dinov2_eq.tools.export", "a run's backbone for timm, Hugging Face, ONNX and others, verified"),
    "report": ("dinov2_eq.tools.report", "one HTML page about one or several runs"),
}


def usage() -> str:
    lines = [
        f"dinov2-eq {__version__}: DINOv2-style pretraining that keeps how an image is transformed",
        "",
        "commands:",
    ]
    lines += [f"  dinov2-eq {name:<18} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "'dinov2-eq COMMAND --help' lists the flags of a command."]
    return "\n".join(lines)


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Splits `argv` into the command that it starts with and its remaining arguments.

    Raises:
        ValueError: no such command.
    """
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return name, list(argv[length:])
    raise ValueError(f"Unknown command {' '.join(argv[:2])!r}; available: {', '.join(COMMANDS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors that the user can fix are printed without a traceback.

    Returns:
        0 on success, 1 if the reader of its output is gone, 2 for a mistake in config, data, files or flags, 3 for a
        NaN or infinity in training, 4 when stopped by a signal, 5 when another process of the run was lost, 130 on
        Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # the reader may be gone
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8; stderr escapes by itself
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        name, rest = find_command(argv)
        importlib.import_module(COMMANDS[name][0]).main(rest)
        sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # as in `dinov2-eq ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it exits
            return 1
        return exit_code(error)
    return 0


def _nobody_reads() -> bool:
    """Whether a BrokenPipeError was about stdout: flushing what could not be written then fails again."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
