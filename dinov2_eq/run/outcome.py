"""Ends a failed command: a sentence and an exit code for what the user can fix, a traceback for a bug."""

import sys
from contextlib import suppress

from dinov2_eq.exits import INTERRUPTED, MISTAKE, NOT_FINITE, PROCESS_LOST, STOPPED, ProcessLost, Stopped

# The first matching row counts.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, INTERRUPTED),
    (Stopped, STOPPED),
    (ProcessLost, PROCESS_LOST),
    (FloatingPointError, NOT_FINITE),
    (ValueError, MISTAKE),
    (OSError, MISTAKE),
)


def exit_code(error: BaseException) -> int:
    """Prints the message of `error` and returns the exit code of its kind; raises it again if it is a bug."""
    code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)
    if code is None:
        raise error
    with suppress(OSError):  # the terminal may be gone
        print(f"dinov2-eq: {_words(error)}", file=sys.stderr)
    return code


def _words(error: BaseException) -> str:
    """The message without the traceback of a data-loading process that torch puts in front of it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2] or "interrupted"
