"""Logs what a process waits for, and makes signals end it wherever it is.

Python runs signal handlers in the main thread, between two instructions. They do not run while a library waits in C++,
for example for another process. A second thread therefore reads the signals too, and ends the process if the main
thread does not.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from dinov2_eq.exits import INTERRUPTED, STOPPED, end_process

# SLURM sends SIGTERM before it takes a node away, and the signal of --signal (submitit: SIGUSR2) before the time limit.
# A closing terminal sends SIGHUP, unless nohup prevents it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
TELL_AFTER_S = 10.0
REACTION_S = 3.0  # how long the main thread may take to handle Ctrl-C while it waits
COMPUTING_S = 30.0  # and while it computes: one call of a library may take long
DOUBLE_PRESS_S = 1.0  # launchers and terminals may forward the same Ctrl-C twice
TICK_S = 0.5
END = 0  # no signal has this number

logger = logging.getLogger(__name__)


class Wait(NamedTuple):
    """A wait of the main thread; `waiting_for` describes the fields."""

    what: str
    advice: str
    since: float  # of time.monotonic()
    tell_after_s: float
    patience_s: float | None


_waits: list[Wait] = []  # of the main thread, the innermost last
_patiences: list[float | None] = [None]  # arguments of `stop_signals_after`, the innermost last
_obeyed: dict[int, float] = {}  # when the main thread started to act on each signal


@contextmanager
def waiting_for(
    what: str, *, advice: str = "", tell_after_s: float = TELL_AFTER_S, patience_s: float | None = None
) -> Iterator[None]:
    """Declares what the main thread waits for during the context; does nothing in other threads.

    `SignalWatch` logs the wait, and ends the process after a stop signal.

    Args:
        what: completes "waiting for ...".
        advice: a sentence to log after that, without its full stop.
        tell_after_s: seconds until the wait is first logged; it is logged again each time it has doubled.
        patience_s: seconds that the wait may continue after a stop signal. None: the limit of the surrounding
            `stop_signals_after`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wait = Wait(what, advice, time.monotonic(), tell_after_s, patience_s)
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


@contextmanager
def stop_signals_after(patience_s: float | None) -> Iterator[None]:
    """Limits how many seconds the main thread may ignore a stop signal before the process is ended; None: no limit."""
    _patiences.append(patience_s)
    try:
        yield
    finally:
        _patiences.pop()


def obey(signum: int) -> None:
    """Records that the main thread now acts on the signal, so that `SignalWatch` does not end the process."""
    _obeyed[signum] = time.monotonic()


class SignalWatch:
    """A context manager around a command, whose thread ends the process if the main thread does not react to a signal.

    - The first Ctrl-C raises KeyboardInterrupt. If that does not reach the main thread, the process ends after
      `REACTION_S` in a `waiting_for`, elsewhere after `COMPUTING_S`. A second Ctrl-C ends it at once.
    - A stop signal ends the process after the `patience_s` of the current `waiting_for`, or else of
      `stop_signals_after`.

    It also logs long waits. Outside the main thread it does nothing.

    Args:
        advice: what the user can do after "stopped by SIGTERM while waiting for data;" in the log.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._thread: threading.Thread | None = None
        self._received: dict[int, float] = {}  # when each signal first arrived
        self._told: dict[Wait, float] = {}  # after how many seconds each wait was last logged

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._previous_sigint = signal.getsignal(signal.SIGINT)
            if callable(self._previous_sigint):
                signal.signal(signal.SIGINT, self._interrupt)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        if callable(self._previous_sigint):
            signal.signal(signal.SIGINT, self._previous_sigint)
        os.write(self._writing, bytes([END]))  # closing the pipe is not enough: forked processes have it open too
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        obey(signum)
        self._previous_sigint(signum, frame)

    def _watch(self) -> None:
        while True:
            if select.select([self._reading], [], [], TICK_S)[0]:
                numbers = os.read(self._reading, 64)
                if END in numbers:
                    return
                self._note(numbers, time.monotonic())
            self._look(time.monotonic())

    def _note(self, numbers: bytes, now: float) -> None:
        for signum in numbers:
            since = self._received.setdefault(signum, now)
            if signum == signal.SIGINT and now - since > DOUBLE_PRESS_S:
                end_process(INTERRUPTED, "interrupted twice; what was not saved is lost")

    def _look(self, now: float) -> None:
        """Ends the process or logs the innermost wait if it is time to do so."""
        waits = list(_waits)
        wait = waits[-1] if waits else None
        while_waiting = f" while waiting for {wait.what}" if wait else ""
        for signum, since in self._received.items():
            if _obeyed.get(signum, 0.0) > since - TICK_S:
                continue
            if signum == signal.SIGINT:
                if now - since > (REACTION_S if wait else COMPUTING_S):
                    end_process(INTERRUPTED, f"interrupted{while_waiting}")
            elif signum in STOP_SIGNALS:
                patience = wait.patience_s if wait and wait.patience_s is not None else _patiences[-1]
                began = max(since, wait.since) if wait else since
                if patience is not None and now - began > patience:
                    name = signal.Signals(signum).name
                    end_process(STOPPED, f"stopped by {name}{while_waiting}; {self._advice}")
        self._told = {each: self._told.get(each, 0.0) for each in waits}
        if wait is None:
            return
        told, waited = self._told[wait], now - wait.since
        if waited >= (max(2 * told, TELL_AFTER_S) if told else wait.tell_after_s):
            self._told[wait] = waited
            logger.warning("waiting for %s (%.0f s)%s", wait.what, waited, wait.advice and f". {wait.advice}")
