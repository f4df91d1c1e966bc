"""Waits that are logged, and signals that end a process where Python itself cannot."""

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
from dinov2_eq.distributed import from_main_process, get_rank, signals
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.distributed.signals import Stopped, StopRequest, stops_raise
from dinov2_eq.waiting import SignalWatch, obey, stop_signals_after, waiting_for
from tests.processes import start_ranks

AGAIN = "run it again"


def be_deaf():
    """Waits in C++, where Python's handlers do not run."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.wait(["never"], timedelta(seconds=30))


def after(seconds, signum):
    threading.Timer(seconds, os.kill, [os.getpid(), signum]).start()


def exit_code_of(function, *args):
    """Without a signal, `be_deaf` ends the process with code 1 after 30 s."""
    ((process,), _) = start_ranks(function, 1, *args)
    process.join(60)
    return process.exitcode


def wait_deaf(signum, nested):
    signal.signal(signum, signal.default_int_handler)  # the tests themselves may run where it is ignored
    waiting.REACTION_S = 0.5
    after(0.5, signum)
    with (
        SignalWatch(AGAIN),
        StopRequest() if nested else stops_raise(AGAIN),
        waiting_for("Godot", patience_s=0.5),
    ):
        be_deaf()


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
    assert exit_code_of(wait_deaf, signum, nested) == code


def compute_deaf(signum):
    signal.signal(signum, signal.default_int_handler)
    waiting.COMPUTING_S = signals.PATIENCE_S = 0.5
    after(0.5, signum)
    with stops_raise(AGAIN):
        be_deaf()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 4), (signal.SIGHUP, 4)])
def test_a_signal_ends_foreign_code_that_nothing_waits_for(signum, code):
    assert exit_code_of(compute_deaf, signum) == code


def be_interrupted_twice():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    after(0.2, signal.SIGINT)
    after(0.2 + 2 * waiting.DOUBLE_PRESS_S, signal.SIGINT)
    with SignalWatch(AGAIN):
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            be_deaf()  # such is cleaning up


def test_a_second_ctrl_c_ends_what_follows_the_first():
    assert exit_code_of(be_interrupted_twice) == 130


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(waiting, "TICK_S", 0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_without_patience_the_main_thread_has_time(signum, quick):
    """The step or checkpoint ends by itself, so nothing else may end the process."""
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with SignalWatch(AGAIN), StopRequest() as stop, waiting_for("a checkpoint to be written"):
            os.kill(os.getpid(), signum)
            time.sleep(0.3)
            assert stop.agreed(torch.device("cpu")) == signum
    finally:
        signal.signal(signum, before)


def test_a_signal_that_is_obeyed_takes_its_time(quick):
    with SignalWatch(AGAIN), stop_signals_after(0.1), waiting_for("the end", patience_s=0.1):
        before = signal.signal(signal.SIGTERM, lambda signum, frame: obey(signum))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        finally:
            signal.signal(signal.SIGTERM, before)


def test_ignored_signals_stay_ignored():
    """A SIGHUP that nohup ignores stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stops_raise(AGAIN):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed(torch.device("cpu")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_an_exception_where_nothing_is_to_be_saved():
    with pytest.raises(Stopped, match=rf"^stopped by SIGTERM; {AGAIN}$"), stops_raise(AGAIN):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_no_handler_of_exceptions_swallows_a_stop():
    with pytest.raises(Stopped), stops_raise(AGAIN):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except Exception:
            time.sleep(30)


def test_long_waits_are_told_again_and_again(quick, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "TELL_AFTER_S", 0.1)
    with SignalWatch(AGAIN):
        with waiting_for("data", advice="Have patience", tell_after_s=0.1):
            while len(caplog.records) < 2:
                time.sleep(0.02)
        with waiting_for("something short", tell_after_s=600):
            time.sleep(0.1)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second == "waiting for data (0 s). Have patience"


def test_the_wakeup_fd_of_others_is_given_back():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with SignalWatch(AGAIN):
            pass
        assert signal.set_wakeup_fd(before) == writing
    finally:
        os.close(reading)
        os.close(writing)


def test_it_ends_while_processes_that_were_forked_inside_go_on():
    """Data-loading processes may live a little longer than the watch."""
    with SignalWatch(AGAIN):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        process.start()
    process.kill()


def test_in_another_thread_nothing_is_installed():
    found = []

    def run():
        with SignalWatch(AGAIN), waiting_for("data"):
            found.append(list(waiting._waits))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]


def main_process_looks_for_long():
    """Process 1 meanwhile waits in a collective and receives the stop signal."""
    with SignalWatch(AGAIN), StopRequest(), process_group(find_launch(), torch.device("cpu"), 60):
        if get_rank() == 1:
            after(0.5, signal.SIGTERM)
        from_main_process(lambda: time.sleep(30), "the data")


def test_who_waits_for_the_main_process_can_be_stopped():
    processes, _ = start_ranks(main_process_looks_for_long, 2)
    processes[1].join(20)
    try:
        assert processes[1].exitcode == 4
    finally:
        processes[0].kill()
