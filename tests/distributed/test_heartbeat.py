"""Which process is called lost; that processes end, tests/reliability shows."""

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from dinov2_eq.distributed.heartbeat import GRACE_S, Heartbeat, Loss


class Interrupted:
    """A store in which others do something between two questions: just before `key` is asked for."""

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


def test_the_first_announced_loss_stays():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    main, other = (Heartbeat(rank, 3, store, silence_limit_s=20) for rank in (0, 1))
    main._name, other._names = "process 0", {0: "process 0"}
    lost = Loss(2, "process 2 has been silent for 10 s")

    def main_process_announces_and_leaves():
        assert main._announce(lost) == lost
        main._store.set("left/0", "")

    main._complain(RuntimeError("Connection reset by peer"))
    other._beat()
    main._beat()
    other._store = Interrupted(other._store, "left/0", main_process_announces_and_leaves)
    other._complained_s = time.monotonic() - GRACE_S
    assert other._find_loss() == lost
    assert main._find_loss() == lost
