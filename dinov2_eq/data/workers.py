"""Data-loading processes: how loaders are made, what a process does before its first sample, and how it may fail."""

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
PATIENCE_S = 15.0  # with a stop signal, for a batch after which it could be obeyed
SHARED_MEMORY = "/dev/shm"
FEWER = "lower train.num_workers, or --num-workers of an evaluation (0: no such processes)"


class Loader(DataLoader):
    """A `torch.utils.data.DataLoader` whose processes leave signals to the main process; its failures are sentences.

    Args:
        collate_fn: from samples to a batch: tensors in tuples, lists and dictionaries of any depth.
        options: of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Dataset, *, collate_fn: Callable[[Sequence], Any] = default_collate, **options) -> None:
        super().__init__(
            dataset,
            collate_fn=InSharedMemory(collate_fn),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # or the loader would draw from torch's own, which models use
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """Starts the processes, if there are any; the batches follow.

        Raises:
            DataError: the system has no room for the processes or their batches, or one of them is gone.
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
                traceback.clear_frames(error.__traceback__)  # they hold `batches`
                continue
        yield batch
    del batches  # ends the other processes: torch raises an error, wherever this process is, for each that fails
    raise failure


class InSharedMemory:
    """Moves a batch to shared memory in the process that made it, where a lack of room is an error of this batch.

    torch would do it in a thread of its own, whose errors reach nobody: the main process would wait for ever.
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
    """One thread for each worker, of which there are as many as there is work for; signals are the main process's.

    A scheduler sends its signals to all processes of a job. The main process decides what to do about them, and needs
    its workers until it has done so.
    """
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = _end_without_room
    signal.set_wakeup_fd(-1)  # or the main process would hear of signals to this one
    if sys.platform == "linux":
        for signum in (signal.SIGUSR2, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_without_room(queue: Queue, error: Exception, batch: Any) -> None:
    """Python calls this, and drops the batch, when it cannot be sent. A process that ends is noticed; that is not."""
    print(f"A batch cannot be handed over: {error}", file=sys.stderr, flush=True)
    os._exit(error.errno or 1 if isinstance(error, OSError) else 1)  # torch tells the main process


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
def lost_workers_explained() -> Iterator[None]:
    """Says what to do when a data-loading process is killed while the main process does something else.

    torch raises a RuntimeError then, at whatever line the main process has reached.

    Raises:
        DataError: instead of that.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_lost_worker(error):
            raise
        raise _explained(error) from None


def _explained(error: Exception) -> DataError | None:
    """The error for the user, of one that a loader raised; None for a bug."""
    text = str(error)
    if advice := _advice(text):
        return DataError(advice)
    # The main process may find that a batch cannot be fetched from a process that is gone.
    if not (_is_of_a_lost_worker(error) or isinstance(error, ConnectionError | EOFError)):
        return None
    return DataError(
        f"A data-loading process is gone ({text.strip(' .') or 'end of file'}). If it has said nothing, the machine "
        f"or the job most likely ran out of memory: ask for more, or {FEWER}; the same command goes on from the newest "
        "checkpoint"
    )


def _is_of_a_lost_worker(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _advice(text: str) -> str:
    """What to do about errors of torch, Python and the kernel whose cause is known; "" for others."""
    if re.search(rf"[Tt]oo many open files|items of ancdata|exit code {errno.EMFILE}\b", text):
        return (
            "The limit of open files is too low: each tensor of a batch is one on its way from a data-loading process. "
            f"Raise it, 'ulimit -n 65536', or {FEWER}"
        )
    if re.search(r"shared memory|Bus error", text):
        room = f"{shutil.disk_usage(SHARED_MEMORY).free / 2**20:.0f} MiB" if os.path.isdir(SHARED_MEMORY) else "nothing"
        return (
            f"{SHARED_MEMORY}, through which data-loading processes hand over their batches, is too small, {room} is "
            f"free. Mount it larger (a container: --shm-size=16g or --ipc=host), or {FEWER}"
        )
    return ""
