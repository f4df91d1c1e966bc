"""How a command that failed ends: one sentence and an exit code for what the user can mend, a traceback for a bug."""

import sys
from contextlib import suppress

from dinov2_eq.waiting import STOPPED

# The first row that fits counts.
EXIT_CODES: tuple[tuple[tuple[type[Exception], ...], int], ...] = (
    ((InterruptedError,), STOPPED),
    ((ConnectionAbortedError,), 5),
    ((FloatingPointError,), 3),
    ((ValueError, OSError), 2),
)


def exit_code(error: Exception) -> int:
    """Prints what `error` says and returns the exit code of its kind; raises it again where it is a bug."""
    code = next((code for kinds, code in EXIT_CODES if isinstance(error, kinds)), None)
    if code is None:
        raise error
    with suppress(OSError):  # the terminal may be gone
        print(f"dinov2-eq: {_words(error)}", file=sys.stderr)
    return code


def _words(error: Exception) -> str:
    """The message alone: torch puts the whole traceback of a data-loading process in front of it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2]
