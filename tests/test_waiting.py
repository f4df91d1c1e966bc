"""Waits that say what they wait for, and signals that end them where Python itself cannot act."""

import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dinov2_eq import waiting
from dinov2_eq.distributed import from_main_process, get_rank
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.distributed.signals import Stopped, StopRequest, stops_raise
from dinov2_eq.waiting import SignalWatch, waiting_for
from tests.processes import start_ranks


def ends_in(patience_s, signum, nested):
    """Waits in C++, where no handler of Python's runs; left to itself, this ends with 1."""
    signal.signal(signum, signal.default_int_handler)  # the tests themselves may run where it is ignored
    waiting.REACTION_S = waiting.CLEANUP_S = 0.5
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threading.Timer(0.5, os.kill, [os.getpid(), signum]).start()
    with SignalWatch(), StopRequest() if nested else stops_raise("again"), waiting_for("Godot", patience_s=patience_s):
        store.wait(["never"], timedelta(seconds=30))


@pytest.mark.parametrize(
    ("signum", "nested", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, True, 4),
        (signal.SIGUSR2, True, 4),
        (signal.SIGHUP, True, 4),
        (signal.SIGTERM, False, 4),
    ],
)
def test_a_signal_ends_a_wait_in_foreign_code(signum, nested, code):
    ((process,), _) = start_ranks(ends_in, 1, 0.5, signum, nested)
    process.join(60)
    assert process.exitcode == code


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_without_patience_the_main_thread_has_time(signum, monkeypatch):
    """It will obey the request by itself: nothing else may end the process."""
    monkeypatch.setattr(waiting, "TICK_S", 0.02)
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with SignalWatch(), StopRequest() as stop, waiting_for("a checkpoint to be written"):
            os.kill(os.getpid(), signum)
            time.sleep(0.2)
            assert stop.agreed(torch.device("cpu")) == signum
    finally:
        signal.signal(signum, before)


def test_ignored_signals_stay_ignored():
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stops_raise("again"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed(torch.device("cpu")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_an_exception_where_nothing_is_to_be_saved():
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; give it again"), stops_raise("give it again"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_long_waits_are_told_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "TICK_S", 0.02)
    with SignalWatch():
        with waiting_for("data", tell_after_s=0.1):
            time.sleep(0.7)
        with waiting_for("something short", tell_after_s=10):
            pass
    told = [record.getMessage() for record in caplog.records]
    assert 2 <= len(told) <= 4  # after 0.1, 0.2 and 0.4 s
    assert all(text.startswith("waiting for data (") for text in told)


def test_the_wakeup_fd_of_others_is_given_back():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with SignalWatch():
            pass
        assert signal.set_wakeup_fd(before) == writing
    finally:
        os.close(reading)
        os.close(writing)


def test_it_ends_while_processes_that_were_forked_inside_go_on():
    """Data-loading processes may outlive it by a moment."""
    with SignalWatch():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        process.start()
    process.kill()


def test_in_another_thread_nothing_is_installed():
    found = []

    def run():
        with SignalWatch(), waiting_for("data"):
            found.append(list(waiting._waits))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]


def main_process_looks_for_long():
    """Process 1 waits in a collective meanwhile, and is told to stop."""
    with SignalWatch(), StopRequest(), process_group(find_launch(), torch.device("cpu"), 60):
        if get_rank() == 1:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
        from_main_process(lambda: time.sleep(30), "the data")


def test_who_waits_for_the_main_process_can_be_stopped():
    processes, _ = start_ranks(main_process_looks_for_long, 2)
    processes[1].join(20)
    try:
        assert processes[1].exitcode == 4
    finally:
        processes[0].kill()
