"""Worker processes of a loader: signals to the whole job, and workers that die."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from dinov2_eq import waiting
from dinov2_eq.data import workers
from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.workers import Loader, lost_workers_explained
from dinov2_eq.distributed.signals import StopRequest
from dinov2_eq.waiting import SignalWatch
from tests.processes import run_ranks, start_ranks

PROGRAM = """
    import multiprocessing, os, signal, sys
    import torch
    from dinov2_eq.data.workers import Loader

    batches = iter(Loader(torch.arange(1000.0), num_workers=2, multiprocessing_context=sys.argv[2]))
    next(batches), next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the main process ends, and its loader is still there")
"""


def start_loader():
    """An iterator after 2 batches, one from each worker, and the process ids of the workers."""
    others = {process.pid for process in multiprocessing.active_children()}
    batches = iter(Loader(torch.arange(1000.0), batch_size=2, num_workers=2))
    next(batches), next(batches)
    pids = {process.pid for process in multiprocessing.active_children()} - others
    assert len(pids) == 2
    return batches, pids


def wait_until_gone(pids, timeout_s):
    deadline = time.monotonic() + timeout_s
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"workers {pids} are still there after {timeout_s} s"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def signal_from_another_process(pids, name):
    subprocess.run(["sh", "-c", f"kill -{name} {' '.join(map(str, pids))}"], check=True)


def test_workers_go_on_after_signals_to_the_whole_job():
    batches, pids = start_loader()
    for name in ("USR2", "TERM", "TERM"):
        signal_from_another_process(pids, name)
    rest = torch.cat(list(batches))
    assert rest.tolist() == list(range(4, 1000))
    del batches
    wait_until_gone(pids, timeout_s=5)


def test_workers_end_with_an_unfinished_iterator():
    batches, pids = start_loader()
    del batches
    wait_until_gone(pids, timeout_s=10)


@pytest.mark.cluster
@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("how", ["raised", "killed"])
def test_workers_end_with_the_main_process(how, context):
    program = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), how, context], capture_output=True, text=True, timeout=60
    )
    assert program.returncode == (1 if how == "raised" else -signal.SIGKILL)
    assert ("the main process ends" in program.stderr) == (how == "raised")
    wait_until_gone([int(pid) for pid in program.stdout.split()], timeout_s=15)


def read_after_a_kill():
    """Runs in a separate process, because torch's handler raises at any line, also after the test."""
    batches, pids = start_loader()
    started = time.monotonic()
    os.kill(next(iter(pids)), signal.SIGKILL)
    try:
        with lost_workers_explained():
            for _ in batches:
                pass
    except DataError as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return str(error), time.monotonic() - started
    return "nothing was raised", 0.0


@pytest.mark.cluster
def test_a_killed_worker_is_reported_at_once():
    ((message, seconds),) = run_ranks(read_after_a_kill, 1)
    assert re.search(
        r"A data-loading process is gone \(.+\)\. If it .* most likely .*lower train\.num_workers", message
    )
    assert seconds < 10


def no_room(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")


def test_no_room_for_a_batch_is_an_error_of_the_batch(monkeypatch):
    """torch alone would print the error in a thread of the worker, and wait forever."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    with pytest.raises(
        DataError, match=r"^/dev/shm, .* is too small: .* is free\. .*--shm-size.* lower train.num_workers"
    ):
        read_all(Loader(torch.arange(10.0), num_workers=1, collate_fn=lambda samples: {"rows": [torch.stack(samples)]}))


def fail_in_the_first_worker(samples):
    if torch.utils.data.get_worker_info().id == 0:
        no_room(samples)
    time.sleep(0.1)
    return samples


def test_the_other_workers_end_before_the_error_of_one_is_raised():
    """A worker that fails later would make torch raise an error anywhere in the main process."""
    others = {process.pid for process in multiprocessing.active_children()}
    batches = iter(Loader(torch.arange(1000.0), num_workers=2, collate_fn=fail_in_the_first_worker))
    pids = {process.pid for process in multiprocessing.active_children()} - others
    with pytest.raises(DataError) as caught:
        list(batches)
    assert caught.value.__context__ is None and not any(is_running(pid) for pid in pids)


def test_no_room_for_the_queues(monkeypatch):
    def fail(loader):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
    with pytest.raises(DataError, match=r"^/dev/shm, .* is too small"):
        iter(Loader(torch.arange(10.0), num_workers=1))


def read_all(loader):
    with lost_workers_explained():
        return list(loader)


def read_with_few_files(limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        return len(read_all(Loader(torch.arange(4000.0), num_workers=2, prefetch_factor=500)))
    except DataError as error:
        return str(error)


def test_too_few_files():
    """If a worker reaches the limit before this process does, it prints so and ends."""
    (message,) = run_ranks(read_with_few_files, 1, 100)
    assert re.match(
        r"The limit of open files is too low.*ulimit -n|A data-loading process is gone .* printed no error", message
    )


def test_a_batch_that_cannot_be_sent_is_noticed(capfd):
    with pytest.raises(DataError, match=r"A data-loading process is gone \(DataLoader worker .* exited unexpectedly"):
        read_all(Loader(torch.arange(10.0), num_workers=1, collate_fn=lambda samples: lambda: samples))
    assert "A batch cannot be sent to the main process: " in capfd.readouterr().err


def test_a_bug_in_a_worker_stays_a_bug():
    def fail(samples):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        read_all(Loader(torch.arange(10.0), num_workers=1, collate_fn=fail))


def hear_of_a_signal_to_a_worker():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore SIGINT
    with SignalWatch("run it again") as watch:
        _batches, pids = start_loader()
        signal_from_another_process(pids, "INT")
        wait_until_gone(pids, timeout_s=20)
        time.sleep(2 * waiting.TICK_S)
        return signal.SIGINT in watch._received


def test_signals_to_a_worker_are_not_the_main_process_s():
    """The worker inherits the file descriptor that Python reports signals to."""
    assert run_ranks(hear_of_a_signal_to_a_worker, 1) == [False]


def wait_for_data_that_never_come():
    workers.PATIENCE_S = 0.5
    with SignalWatch("run it again"), StopRequest():
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
        next(iter(Loader(torch.arange(10.0), num_workers=1, collate_fn=lambda samples: time.sleep(30))))


def test_a_stop_does_not_wait_for_data_for_ever():
    ((process,), _) = start_ranks(wait_for_data_that_never_come, 1)
    process.join(20)
    assert process.exitcode == 4
