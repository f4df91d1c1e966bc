"""What a worker process of a data loader does before its first sample, and what is said when one is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinov2_eq.data.datasets import DataError

PARENT_CHECK_S = 5.0


def init_worker(worker_id: int) -> None:
    """One thread for each worker, of which there are as many as there is work for; signals are the main process's.

    A scheduler sends its signals to all processes of a job. The main process decides what to do about them, and needs
    its workers until it has done so.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A SIGTERM of the main process must end the worker: by it, Python closes the workers that are left at its end.

    So must the death of the main process, which torch notices in workers that were forked from it, and in no others.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Says what to do when a worker is killed.

    torch raises a RuntimeError then, at whatever line the main process has reached; or the main process finds that a
    batch cannot be fetched from the dead one.

    Raises:
        DataError: instead of either.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            f"A data-loading process is gone ({str(error).strip(' .') or 'end of file'}). Most likely the machine, or "
            "the job, ran out of memory: lower train.num_workers or ask for more memory; the same command goes on from "
            "the newest checkpoint"
        ) from None
