"""A signal to one process stops all of them at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from dinov2_eq.distributed import is_distributed

# SLURM: SIGTERM before it takes a node away, and whatever --signal names (submitit: SIGUSR2) before the time is up.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StoppedBySignal(InterruptedError):
    """The run saved its state and stopped because it was asked to; the same command goes on from there."""

    def __init__(self, signum: int, step: int) -> None:
        self.signum = signal.Signals(signum)
        super().__init__(f"stopped by {self.signum.name} after step {step}, saved; the same command goes on from there")


class StopRequest:
    """A context manager in which `SIGNALS` only make a note, which `agreed` reads."""

    def __init__(self) -> None:
        self._signum = 0

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received, 0 for none; all processes must ask, and all get the same answer."""
        if not is_distributed():
            return self._signum
        signum = torch.tensor(self._signum, device=device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)
