"""Worker processes of a loader: signals to the whole job, and workers that die."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch.utils.data import DataLoader

from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.workers import init_worker, worker_deaths_explained
from tests.processes import run_ranks

PROGRAM = """
    import multiprocessing, os, signal, sys
    import torch
    from torch.utils.data import DataLoader
    from dinov2_eq.data.workers import init_worker

    context = sys.argv[2]
    batches = iter(
        DataLoader(torch.arange(1000.0), num_workers=2, worker_init_fn=init_worker, multiprocessing_context=context)
    )
    next(batches), next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the main process ends, and its loader is still there")
"""


def start_loader():
    """An iterator that has given 2 batches, one of each worker, and the process ids of these."""
    others = {process.pid for process in multiprocessing.active_children()}
    batches = iter(DataLoader(torch.arange(1000.0), batch_size=2, num_workers=2, worker_init_fn=init_worker))
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
    """In a process of its own: torch's handler raises at whatever line the process has reached, later ones too."""
    batches, pids = start_loader()
    started = time.monotonic()
    os.kill(next(iter(pids)), signal.SIGKILL)
    try:
        with worker_deaths_explained():
            for _ in batches:
                pass
    except DataError as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return str(error), time.monotonic() - started
    return "nothing was raised", 0.0


def test_a_killed_worker_is_reported_at_once():
    ((message, seconds),) = run_ranks(read_after_a_kill, 1)
    assert re.search(r"A data-loading process is gone \(.+\)\. Most likely .*lower train\.num_workers", message)
    assert seconds < 10
