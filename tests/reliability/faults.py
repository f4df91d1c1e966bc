"""Faults that strike one process of a run at a chosen step, in the middle of its work."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dinov2_eq.distributed import get_rank
from dinov2_eq.equivariance.transforms import SE2, TransformRanges
from tests.disks import fill

# In the working directory of the run.
FAULT = Path("fault")
RUN = Path("run")
CHECKPOINTS = RUN / "checkpoints"
PERIOD_STEPS = 2  # between checkpoints


class Faulty(SE2):
    """As `se2`, until the fault comes that the file `FAULT` describes: "kill 1 6" kills process 1 in the sixth step.

    It comes when the checkpoint before that step is whole, if this start writes one, and once: the next start finds no
    such file. Steps count from the start of the processes.
    """

    def __init__(self, ranges: TransformRanges) -> None:
        super().__init__(ranges)
        self.calls = 0
        name, rank, step = FAULT.read_text().split() if FAULT.exists() else ("", 0, 0)
        self.fault, self.rank, self.step = name, int(rank), int(step)

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        views = super().apply(images, theta, size)
        self.calls += 1
        if self.calls == self.step:
            if self.step > PERIOD_STEPS:
                _wait_for_checkpoint(self.step - 1)
            if get_rank() == self.rank:
                FAULT.unlink()
                if self.fault == "nan":
                    return views * float("nan")
                FAULTS[self.fault]()
        return views


def _wait_for_checkpoint(done: int) -> None:
    newest = CHECKPOINTS / str(done - done % PERIOD_STEPS)
    deadline = time.monotonic() + 30
    while not newest.is_dir():
        assert time.monotonic() < deadline, f"{newest} is still not there"
        time.sleep(0.01)


def _signal(signum: int) -> None:
    os.kill(os.getpid(), signum)


def _wait_for_signal() -> None:
    """From outside."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing)
    os.read(reading, 1)
    signal.set_wakeup_fd(previous)


def _raise(error: Exception) -> None:
    raise error


def _kill_a_worker() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def _kill_as_it(event: str, ending: str) -> None:
    """Kills this process when it is about to open, or to rename, a path of an unfinished checkpoint that ends so."""

    def hook(name: str, arguments: tuple) -> None:
        if name == event and ".writing" in str(arguments[0]) and str(arguments[0]).endswith(ending):
            _signal(signal.SIGKILL)

    sys.addaudithook(hook)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: _signal(signal.SIGKILL),
    "stop": lambda: _signal(signal.SIGSTOP),
    "term": lambda: _signal(signal.SIGTERM),
    "usr2": lambda: _signal(signal.SIGUSR2),
    "wait": _wait_for_signal,
    "mistake": lambda: _raise(ValueError("this image is not what it seems")),
    "memory": lambda: _raise(RuntimeError("out of memory")),
    "kill_a_worker": _kill_a_worker,
    "kill_as_it_writes": lambda: _kill_as_it("open", ".distcp"),
    "kill_as_it_renames": lambda: _kill_as_it("os.rename", ".writing"),
    "fill_checkpoints": lambda: fill(CHECKPOINTS),
    "fill_run": lambda: fill(RUN),
}
