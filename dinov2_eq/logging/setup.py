"""Where log lines go, and the description of code and machine that every run saves."""

import logging
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dinov2_eq import __version__
from dinov2_eq.distributed import get_rank, is_main_process

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
PACKAGES = ("torch", "torchvision", "xformers", "kornia", "numpy")


class _Terminal:
    """A wrapper of stderr for lines and progress bars that ignores a terminal that is gone.

    If a write fails inside tqdm, tqdm never releases its lock, and the next log line would wait forever.
    """

    GONE = (OSError, ValueError, AttributeError)  # hung up, closed, or never there

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(*self.GONE):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*self.GONE):
            sys.stderr.flush()


_TERMINAL = _Terminal()


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Makes a tqdm progress bar that is only shown by the main process, and only on a terminal.

    Args:
        items, options: arguments of tqdm.
    """
    return tqdm(items, file=_TERMINAL, dynamic_ncols=True, disable=None if is_main_process() else True, **options)


class _AboveProgressBar(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=_TERMINAL)
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that escapes text that is not valid Unicode, such as file names, and reports a full disk only once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            _TERMINAL.write(f"{self.baseFilename} cannot be written any more: {error.strerror}\n")


def setup_logging(folder: Path | None = None) -> None:
    """Sends all log lines to `<folder>/logs/log.<rank>.txt`, if a folder is given, and some to the terminal.

    The terminal shows the lines of the main process and errors of the others. A full disk or a terminal that is gone
    does not make a log call fail.
    """
    terminal = _AboveProgressBar(logging.INFO if is_main_process() else logging.ERROR)
    handlers: list[logging.Handler] = [terminal]
    if folder is not None:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(folder / "logs" / f"log.{get_rank()}.txt"))
    logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt="%Y-%m-%d %H:%M:%S", handlers=handlers, force=True)


def describe_run(device: torch.device) -> dict[str, str]:
    """Collects versions, the device, and in a checkout the commit, with "-dirty" if there are uncommitted changes."""
    description = {
        "dinov2_eq": __version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
    }
    for package in PACKAGES:
        try:
            description[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            description[package] = "not installed"
    description["commit"] = _commit()
    return description


def _commit() -> str:
    checkout = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != checkout:
            return "not a checkout"  # installed somewhere below another repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
