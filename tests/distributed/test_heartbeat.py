"""Which process the heartbeat calls lost; tests/reliability shows that the others end."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from dinov2_eq.distributed.heartbeat import GRACE_S, Heartbeat, LostProcess


class Interrupted:
    """A store in which another process acts just before `key` is read."""

    def __init__(self, store: dist.Store, key: str, happens: Callable[[], None]) -> None:
        self._store = store
        self._key = key
        self._happens = happens

    def __getattr__(self, name):
        return getattr(self._store, name)

    def check(self, keys):
        if keys == [self._key]:
            self._happens()
        return self._store.check(keys)


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))


def test_the_first_announced_loss_stays(store):
    main, other = (Heartbeat(rank, 3, store, silence_limit_s=20) for rank in (0, 1))
    main._name, other._names = "process 0", {0: "process 0"}
    lost = LostProcess(2, "process 2 has been silent for 10 s")

    def main_process_announces_and_leaves():
        assert main._announce(lost) == lost
        main._store.set("left/0", "")

    main._complain(RuntimeError("Connection reset by peer"))
    other._beat()
    main._beat()
    other._store = Interrupted(other._store, "left/0", main_process_announces_and_leaves)
    other._complained_s = time.monotonic() - GRACE_S
    assert other._find_lost_process() == lost
    assert main._find_lost_process() == lost


def test_the_main_process_leaves_after_those_that_answer(store):
    """It may host the store from which the others read the reason."""
    main, silent, other = (Heartbeat(rank, 3, store, silence_limit_s=20) for rank in range(3))

    def leave_when_the_main_process_is_about_to():
        store.wait(["heartbeat/left/0"])
        other._take_leave()

    last = threading.Thread(target=leave_when_the_main_process_is_about_to)
    last.start()
    main._take_leave(LostProcess(1, "process 1 has been silent for 10 s"))
    assert store.check(["heartbeat/left/2"]) and not store.check(["heartbeat/left/1"])
    last.join()

    silent._take_leave()
    main._take_leave(LostProcess(1, "process 1 stopped: RuntimeError: out of memory", silent=False))


def test_one_complaint_is_explained_by_the_silence_that_follows_it(store):
    main, other = (Heartbeat(rank, 3, store, silence_limit_s=100) for rank in (0, 1))
    silent = Heartbeat(2, 3, store, silence_limit_s=100)
    main._names = {1: "process 1", 2: "process 2"}
    for process in (main, other, silent):
        process._beat()
    assert main._find_lost_process() is None
    for rank, (count, since) in main._seen.items():
        main._seen[rank] = count, since - 2 * GRACE_S  # both have computed for long, holding the interpreter
    other._name = "process 1"
    other._complain(RuntimeError("out of memory"))
    assert main._find_lost_process() is None
    main._complained_s -= GRACE_S + 1
    assert main._find_lost_process() == LostProcess(2, f"process 2 has been silent for {2 * GRACE_S:.0f} s")
