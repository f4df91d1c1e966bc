"""A signal to one process stops all of them at the same step."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dinov2_eq.distributed import PATIENCE_S, is_distributed
from dinov2_eq.waiting import STOP_SIGNALS, SignalWatch, waiting_for


class Stopped(InterruptedError):
    """The command was asked to stop by a signal, and stops."""


class StoppedBySignal(Stopped):
    """The run saved its state and stopped because it was asked to; the same command goes on from there."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name} after step {step}, saved; the same command goes on from there")


class StopRequest:
    """A context manager in which `STOP_SIGNALS` only make a note, which `agreed` reads; what is ignored stays so."""

    def __init__(self) -> None:
        self._signum = 0

    def __enter__(self) -> "StopRequest":
        self._previous = _handle(self._note)
        self._obeys = waiting_for("", tell_after_s=math.inf)  # whatever the code around this does about signals
        self._obeys.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._obeys.__exit__(None, None, None)
        _restore(self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received, 0 for none; all processes must ask, and all get the same answer."""
        if not is_distributed():
            return self._signum
        signum = torch.tensor(self._signum, device=device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


@contextmanager
def stops_raise(advice: str) -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, with the advice behind the name of the signal.

    Where Python's handlers do not run, the process ends after `PATIENCE_S` seconds: a `SignalWatch` is included.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(signum).name}; {advice}")

    previous = _handle(stop, signal.SIGTERM, signal.SIGHUP)
    try:
        with SignalWatch(), waiting_for("", tell_after_s=math.inf, patience_s=PATIENCE_S):
            yield
    finally:
        _restore(previous)


def _handle(handler: Any, *signals: int) -> dict[int, Any]:
    """Installs a handler for signals that are not ignored; returns those from before."""
    before = {signum: signal.getsignal(signum) for signum in signals or STOP_SIGNALS}
    kept = {signum: previous for signum, previous in before.items() if previous is not signal.SIG_IGN}
    for signum in kept:
        signal.signal(signum, handler)
    return kept


def _restore(handlers: dict[int, Any]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
