"""Waits that say what they wait for, and that a signal ends wherever the process waits.

Python runs its handlers in the main thread, between two instructions. A library that waits in C++, for another process
say, keeps them from running. So a thread reads the signals too, and ends the process where the main thread does not.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# SLURM: SIGTERM before it takes a node away, and whatever --signal names (submitit: SIGUSR2) before the time is up. A
# terminal that closes: SIGHUP, unless nohup keeps it away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
STOPPED, INTERRUPTED = 4, 130  # exit codes
TELL_AFTER_S = 10.0
REACTION_S = 3.0  # for Ctrl-C to reach the main thread while it waits
CLEANUP_S = 30.0  # for what the main thread does after Ctrl-C, or before it notices
TICK_S = 0.5
END = 0  # no signal has this number

logger = logging.getLogger(__name__)


class Wait(NamedTuple):
    what: str
    since: float  # of time.monotonic()
    tell_after_s: float
    patience_s: float | None


_waits: list[Wait] = []  # of the main thread, the innermost last


@contextmanager
def waiting_for(what: str, *, tell_after_s: float = TELL_AFTER_S, patience_s: float | None = None) -> Iterator[None]:
    """Says what the main thread waits for, for as long as the context lasts; does nothing in other threads.

    What follows is up to `SignalWatch`.

    Args:
        what: after "waiting for".
        tell_after_s: the log says so when the wait has lasted so long, and again whenever it has doubled.
        patience_s: a stop signal ends the process when the wait has gone on for so long after it. None: never, because
            the main thread is about to obey it by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wait = Wait(what, time.monotonic(), tell_after_s, patience_s)
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


class SignalWatch:
    """A context manager around a command, with a thread that ends the process where the main thread cannot.

    - Ctrl-C: `REACTION_S` later where the main thread is in a `waiting_for`, else `CLEANUP_S` later.
    - A stop signal: when the patience of the `waiting_for` is over.

    It also logs waits that are long. In any other thread than the main one it does nothing.
    """

    def __enter__(self) -> "SignalWatch":
        self._thread = None
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._previous = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            signal.set_wakeup_fd(self._previous)
            os.write(self._writing, bytes([END]))  # closing it would not do: forked processes have it too
            self._thread.join()
            os.close(self._reading)
            os.close(self._writing)

    def _watch(self) -> None:
        received: dict[int, float] = {}  # when each signal came first
        told: dict[Wait, float] = {}  # for each wait, after how many seconds it was told
        while True:
            if select.select([self._reading], [], [], TICK_S)[0]:
                numbers = os.read(self._reading, 64)
                if END in numbers:
                    return
                for signum in numbers:
                    received.setdefault(signum, time.monotonic())
            waits, now = list(_waits), time.monotonic()
            wait = waits[-1] if waits else None
            self._obey(received, wait, now)
            told = {each: told.get(each, 0.0) for each in waits}
            if wait is not None and now - wait.since >= max(wait.tell_after_s, 2 * told[wait]):
                told[wait] = now - wait.since
                logger.warning("waiting for %s (%.0f s)", wait.what, now - wait.since)

    def _obey(self, received: dict[int, float], wait: Wait | None, now: float) -> None:
        named = wait is not None and bool(wait.what)
        while_waiting = f" while waiting for {wait.what}" if named else ""
        since = received.get(signal.SIGINT)
        if since is not None and now - since > (REACTION_S if named else CLEANUP_S):
            end_process(INTERRUPTED, f"interrupted{while_waiting}")
        if wait is None or wait.patience_s is None:
            return
        for signum in STOP_SIGNALS:
            if signum in received and now - max(received[signum], wait.since) > wait.patience_s:
                words = f"stopped by {signal.Signals(signum).name}{while_waiting}"
                end_process(STOPPED, f"{words}; the same command goes on from what was saved before")


def end_process(code: int, text: str) -> None:
    """Ends this process from any of its threads, at once and without cleaning up; the log says why."""
    logger.error("%s", text)
    os._exit(code)
