"""Data loaders whose processes handle signals, shared memory and failures."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from dinov2_eq.data.datasets import DataError
from dinov2_eq.waiting import waiting_for

PARENT_CHECK_S = 5.0
PATIENCE_S = 15.0  # how long a stop signal waits for the current batch
SHARED_MEMORY = "/dev/shm"
FEWER = "lower train.num_workers, or --num-workers of an evaluation (0: no data-loading processes)"


class Loader(DataLoader):
    """A `torch.utils.data.DataLoader` whose processes leave signals to the main process, with readable errors.

    Args:
        collate_fn: makes a batch of samples: tensors in tuples, lists and dictionaries of any depth.
        options: arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Dataset, *, collate_fn: Callable[[Sequence], Any] = default_collate, **options) -> None:
        super().__init__(
            dataset,
            collate_fn=InSharedMemory(collate_fn),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # or the loader would draw from torch's global one, which models use
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """Starts the processes, if there are any, and yields batches.

        Raises:
            DataError: the system lacks resources for the processes or their batches, or a process is gone.
        """
        try:
            batches = super().__iter__()
        except OSError as error:
            if not self.num_workers:
                raise
            text = "shared memory" if error.errno in (errno.ENOSPC, errno.ENOSYS) else str(error)
            raise DataError(_advice(text) or f"Data-loading processes cannot be started ({error}); {FEWER}") from None
        return _named_waits(batches, has_workers=self.num_workers > 0)


def _named_waits(batches: Iterator[Any], has_workers: bool) -> Iterator[Any]:
    failure = None
    while failure is None:
        with waiting_for("data", patience_s=PATIENCE_S):
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                failure = _explained(error) if has_workers else None
                if failure is None:
                    raise
                traceback.clear_frames(error.__traceback__)  # they keep `batches` alive
                continue
        yield batch
    del batches  # ends the other processes; otherwise torch could raise another error here when one of them fails
    raise failure


class InSharedMemory:
    """A collate function that moves the batch to shared memory at once, so that a lack of space raises an error.

    torch would do this in a background thread, whose errors are lost, and the main process would wait forever.
    """

    def __init__(self, collate: Callable[[Sequence], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is not None:
            _share(batch)
        return batch


def _share(batch: Any) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, dict):
        _share(tuple(batch.values()))
    elif isinstance(batch, tuple | list):
        for part in batch:
            _share(part)


def init_worker(worker_id: int) -> None:
    """Sets up a data-loading process: one thread, and signals are left to the main process.

    A scheduler sends its signals to all processes of a job. The main process decides how to react, and needs its
    workers until then.
    """
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = _end_without_room
    signal.set_wakeup_fd(-1)  # or the main process would be notified of signals to this one
    if sys.platform == "linux":
        for signum in (signal.SIGUSR2, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_without_room(queue: Queue, error: Exception, batch: Any) -> None:
    """Ends the process when a batch cannot be sent; Python would only drop the batch, which nobody notices."""
    print(f"A batch cannot be sent to the main process: {error}", file=sys.stderr, flush=True)
    os._exit(error.errno or 1 if isinstance(error, OSError) else 1)  # torch notices and tells the main process


def _end_with_the_parent() -> None:
    """Ends the worker on a SIGTERM from the main process, or when the main process dies.

    Python sends this SIGTERM to end remaining workers when it exits. torch itself only notices the death of the main
    process in forked workers.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Replaces torch's error about a killed data-loading process by one that says what to do.

    torch raises a RuntimeError at whatever line the main process has reached.

    Raises:
        DataError: in place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_lost_worker(error):
            raise
        raise _explained(error) from None


def _explained(error: Exception) -> DataError | None:
    """Turns an error of a loader into one for the user; None if it is a bug."""
    text = str(error)
    if advice := _advice(text):
        return DataError(advice)
    # The other two: the main process failed to fetch a batch from a process that is gone.
    if not (_is_of_a_lost_worker(error) or isinstance(error, ConnectionError | EOFError)):
        return None
    return DataError(
        f"A data-loading process is gone ({text.strip(' .') or 'end of file'}). If it printed no error, the machine or "
        f"the job most likely ran out of memory: request more, or {FEWER}. Rerun the same command to resume from the "
        "newest checkpoint"
    )


def _is_of_a_lost_worker(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _advice(text: str) -> str:
    """Advice for errors of torch, Python and the kernel with a known cause; "" for others."""
    if re.search(rf"[Tt]oo many open files|items of ancdata|exit code {errno.EMFILE}\b", text):
        return (
            "The limit of open files is too low: each tensor that a data-loading process sends is an open file. Raise "
            f"the limit with 'ulimit -n 65536', or {FEWER}"
        )
    if re.search(r"shared memory|Bus error", text):
        free = f"{shutil.disk_usage(SHARED_MEMORY).free / 2**20:.0f} MiB" if os.path.isdir(SHARED_MEMORY) else "nothing"
        return (
            f"{SHARED_MEMORY}, through which data-loading processes send their batches, is too small: {free} is free. "
            f"Mount it larger (a container: --shm-size=16g or --ipc=host), or {FEWER}"
        )
    return ""
