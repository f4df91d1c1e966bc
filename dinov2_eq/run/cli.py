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
    """The command that `argv` starts with, and the rest.

    Raises:
        ValueError: no such command.
    """
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return name, list(argv[length:])
    raise ValueError(f"Unknown command {' '.join(argv[:2])!r}; available: {', '.join(COMMANDS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; what the user can mend is printed without a traceback.

    Returns:
        0 on success, 2 on a mistake in config, data, files or flags, 3 when training met a NaN or infinity, 4 when a
        signal stopped it, 5 when another process of the run was lost, 130 on Ctrl-C; 1 when nobody reads its output.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # nobody reads it
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8; stderr takes any
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
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # `dinov2-eq ... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at its end
            return 1
        return exit_code(error)
    return 0


def _nobody_reads() -> bool:
    """Whether it is the output that a BrokenPipeError is about: what could not be written is still there to fail."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
