"""Stop signals: a signal to one process stops all of them after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dinov2_eq.distributed import PATIENCE_S, is_distributed
from dinov2_eq.exits import Stopped
from dinov2_eq.waiting import STOP_SIGNALS, SignalWatch, obey, stop_signals_after


class StoppedBySignal(Stopped):
    """The run saved its state and stopped because of a signal; the same command resumes it."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name} after step {step}, saved; rerun the same command to resume")


class StopRequest:
    """A context manager that records `STOP_SIGNALS` for `agreed` to read; ignored signals stay ignored."""

    def __init__(self) -> None:
        self._signum = 0

    def __enter__(self) -> "StopRequest":
        self._previous = _handle(self._note, STOP_SIGNALS)
        self._patience = stop_signals_after(None)  # no limit: the run stops after the current step
        self._patience.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._patience.__exit__(None, None, None)
        _restore(self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received, or 0; all processes must call it, and all get the same answer."""
        signum = self._signum
        if is_distributed():
            received = torch.tensor(signum, device=device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            signum = int(received)
        if signum:
            for each in STOP_SIGNALS:
                obey(each)
        return signum


@contextmanager
def stops_raise(advice: str) -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise `Stopped`; where Python cannot do that, a `SignalWatch` ends the process.

    Args:
        advice: what the user can do then; follows the name of the signal in the message.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        obey(signum)
        raise Stopped(f"stopped by {signal.Signals(signum).name}; {advice}")

    previous = _handle(stop, (signal.SIGTERM, signal.SIGHUP))
    try:
        with SignalWatch(advice), stop_signals_after(PATIENCE_S):
            yield
    finally:
        _restore(previous)


def _handle(handler: Any, signals: tuple[int, ...]) -> dict[int, Any]:
    """Installs a handler for the signals that are not ignored; returns the previous handlers."""
    before = {signum: signal.getsignal(signum) for signum in signals}
    kept = {signum: previous for signum, previous in before.items() if previous is not signal.SIG_IGN}
    for signum in kept:
        signal.signal(signum, handler)
    return kept


def _restore(handlers: dict[int, Any]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
