"""Runs commands of `dinov2-eq` in processes of their own, and ends them when this one is stopped."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dinov2_eq.exits import STOPPED

PATIENCE_S = 60.0  # how long a program may take to save its state


class Programs:
    """A context manager; at its end, also after an error, the programs that still run get SIGTERM.

    Several threads may call `run` at the same time.

    Args:
        environment: variables of the programs besides those of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ | (environment or {})
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def run(self, words: Sequence[str], log: Path) -> int:
        """Runs `dinov2-eq WORDS`, writes its output to `log`, and returns its exit code; after `end` runs nothing."""
        with log.open("w") as file:
            with self._lock:
                if self._ended:
                    return STOPPED
                command = [sys.executable, "-m", "dinov2_eq.run.cli", *words]
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self._environment)
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        return code

    def end(self) -> None:
        """Sends SIGTERM to all programs, and SIGKILL to those that still run after `PATIENCE_S`."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            process.kill()  # does nothing if it has ended


def last_line(log: Path, code: int) -> str:
    """Says why a program failed: the last line of its output, or else its exit code; and where to read more."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else f'exit code {code}'} (see {log})"
