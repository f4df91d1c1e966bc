"""Exit codes, the exceptions that lead to them, and a way to end a process at once."""

import logging
import os
import threading

MISTAKE = 2  # in config, data, files or flags
NOT_FINITE = 3  # the loss or a gradient
STOPPED = 4  # by a signal
PROCESS_LOST = 5  # another process of the run
INTERRUPTED = 130  # by Ctrl-C, the usual code of shells
LOGGING_S = 1.0  # how long the last log line may take

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal asked the command to stop; a BaseException, so that `except Exception` does not catch it."""


class ProcessLost(OSError):
    """Another process of the run left before all had connected."""


def end_process(code: int, text: str) -> None:
    """Logs `text` and ends this process at once, from any thread and without cleaning up."""
    # The main thread may hold the lock of the log, so do not wait for it forever.
    timer = threading.Timer(LOGGING_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    logger.error("%s", text)
    os._exit(code)
