"""A process that dies or hangs ends the run on all others, in bounded time and by name."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from dinov2_eq.exits import PROCESS_LOST

logger = logging.getLogger(__name__)

PERIOD_S = 2.0
GRACE_S = 10.0  # how long the others may take to notice by themselves what one process has noticed


class LostProcess(NamedTuple):
    """Which process is lost, and a sentence about it."""

    rank: int
    text: str
    silent: bool = True  # False: it has said so itself


class Heartbeat:
    """Every process counts up in a store that all share; the main process watches the others, and they watch it.

    A context manager around the run. When another process is lost, the log says which and this process ends with code
    5: from a thread, as the main thread may be waiting in a collective that will never finish. When the code inside
    the context raises on one process alone, the others are told why and end too.

    Args:
        silence_limit_s: for how long a process may not count up, and the host of the store not answer.
        store_host: what the log calls that host; None: the main process.
    """

    def __init__(
        self, rank: int, world_size: int, store: dist.Store, silence_limit_s: float, store_host: str | None = None
    ) -> None:
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self.watched = self.others if rank == 0 else [0]
        self.silence_limit_s = silence_limit_s
        self.store_host = store_host
        # A connection of its own: one shared with the process group is blocked while a collective is set up.
        self._store = dist.PrefixStore("heartbeat", store.clone())
        self._store.set_timeout(timedelta(seconds=silence_limit_s))
        self._count = 0
        self._seen: dict[int, tuple[bytes, float]] = {}  # count of each watched process, and when it last changed
        self._complained_s: float | None = None  # when this process first saw a complaint
        self._failed = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._name = f"process {self.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self._store.set(f"name/{self.rank}", self._name)
        self._beat()
        self._names = {rank: self._store.get(f"name/{rank}").decode() for rank in self.watched}
        host = self.store_host or self._names.get(0, self._name)
        self._unreachable = LostProcess(0, f"{host} hosts the connection of all, and no longer answers")
        if self.others:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if not self.others:
            return
        if error is not None:
            self._failed = True
            self._complain(error)
        if isinstance(error, RuntimeError):
            # Most likely a collective that failed because another process is gone. The watch will name that one and
            # end this process, or find that the fault is this process's own.
            self._thread.join()
        self._leaving.set()
        with self._limited():
            self._take_leave()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Ends this process when the host of the store hangs: torch waits for its answers without a limit."""
        limit = threading.Timer(self.silence_limit_s, self._end, [self._unreachable])
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def _end(self, loss: LostProcess) -> None:
        logger.error("%s. This process ends; start the run again, it goes on from its newest checkpoint", loss.text)
        try:
            if loss is not self._unreachable:
                with self._limited():
                    self._take_leave(loss)  # the others read from the store which process is lost
        finally:
            os._exit(PROCESS_LOST)

    def _take_leave(self, loss: LostProcess | None = None) -> None:
        """Announces that this process ends; the main one then waits up to 10 s until all responsive ones have."""
        with suppress(dist.DistError):  # the host of the store may have left before
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:  # it may be the host of the store that the others still ask
                silent = loss.rank if loss is not None and loss.silent else None
                awaited = [f"left/{rank}" for rank in self.others if rank != silent]
                deadline = time.monotonic() + GRACE_S
                while awaited and time.monotonic() < deadline and not self._store.check(awaited):
                    time.sleep(PERIOD_S / 10)

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"count/{self.rank}", str(self._count))

    def _complain(self, error: BaseException) -> None:
        """Tells the others, who end unless they leave by themselves for the same reason."""
        complaint = LostProcess(self.rank, f"{self._name} stopped: {type(error).__name__}: {error}", silent=False)
        with suppress(dist.DistError):  # without a store there is nobody to tell
            self._store.compare_set("complaint", "", json.dumps(complaint))  # the first complaint stays

    def _watch(self) -> None:
        while not self._leaving.wait(PERIOD_S):
            try:
                with self._limited():
                    self._beat()
                    loss = self._find_loss()
            except dist.DistError:
                loss = self._unreachable
            if loss is None or self._leaving.is_set():
                continue
            if loss.rank == self.rank and self._failed and not loss.silent:
                return  # the main thread has the error in hand
            self._end(loss)

    def _find_loss(self) -> LostProcess | None:
        if self._store.check(["loss"]):
            return LostProcess(*json.loads(self._store.get("loss")))
        now = time.monotonic()
        complaint = None
        if self._store.check(["complaint"]):
            complaint = LostProcess(*json.loads(self._store.get("complaint")))
            self._complained_s = self._complained_s or now
        for rank, count in zip(
            self.watched, self._store.multi_get([f"count/{rank}" for rank in self.watched]), strict=True
        ):
            last_count, since = self._seen.setdefault(rank, (count, now))
            if count != last_count:
                self._seen[rank] = (count, now)
                continue
            if complaint is None:
                lost = now - since > self.silence_limit_s
            else:  # the process that complains is alive; another one's silence explains it
                lost = rank != complaint.rank and now - max(since, self._complained_s) > GRACE_S
            if lost:
                return self._announce(LostProcess(rank, f"{self._names[rank]} has been silent for {now - since:.0f} s"))
        if complaint is not None:
            left = self._store.check([f"left/{complaint.rank}"])  # then the fault was its own
            if now - self._complained_s > (PERIOD_S if left else 2 * GRACE_S):
                return self._announce(complaint)
        return None

    def _announce(self, loss: LostProcess) -> LostProcess:
        """The first announcement stays: who made it has left, and a second would name that process instead."""
        return LostProcess(*json.loads(self._store.compare_set("loss", "", json.dumps(loss))))
