"""How a process ends: exit codes, and the exceptions that stand for them."""

import logging
import os
import threading

MISTAKE = 2  # in config, data, files or flags
NOT_FINITE = 3
STOPPED = 4  # by a signal
PROCESS_LOST = 5  # another one of the run
INTERRUPTED = 130  # by Ctrl-C, as shells have it
LOGGING_S = 1.0

logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """A signal asked the command to stop. It may arise anywhere, so `except Exception` lets it through."""


class ProcessLost(OSError):
    """Another process of the run left before all had met."""


def end_process(code: int, text: str) -> None:
    """Ends this process at once, from any of its threads and without cleaning up; the log says why."""
    # The main thread may be stuck in the middle of a log line.
    timer = threading.Timer(LOGGING_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    logger.error("%s", text)
    os._exit(code)
