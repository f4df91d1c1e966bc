"""The heartbeat: when a process dies or hangs, all others name it and end within a bounded time."""

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
GRACE_S = 10.0  # how long the other processes may take to notice what one process has noticed


class LostProcess(NamedTuple):
    """A process that is lost, with a sentence about it."""

    rank: int
    text: str
    silent: bool = True  # False: the process reported its own failure


class Heartbeat:
    """A context manager around the run that ends this process, with code 5, when another one is lost.

    Every process increments a counter in a shared store. The main process watches the others, and they watch it. When
    a process is lost, the log names it. A thread ends this process, because the main thread may be waiting in a
    collective that will never finish. When the code inside the context raises on one process alone, the others are
    told why and end too.

    Args:
        silence_limit_s: seconds without a new count, or without a response of the store, until a process is lost.
        store_host: what the log calls the host of the store; None: the main process.
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
        self._complained_s: float | None = None  # when this process first saw that another one had failed
        self._failed = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._name = f"process {self.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self._store.set(f"name/{self.rank}", self._name)
        self._beat()
        self._names = {rank: self._store.get(f"name/{rank}").decode() for rank in self.watched}
        host = self.store_host or self._names.get(0, self._name)
        self._unreachable = LostProcess(0, f"{host} hosts the store of all processes and no longer responds")
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
            # Most likely a collective failed because another process is gone. The thread names that process and ends
            # this one, or returns if this process itself is at fault.
            self._thread.join()
        self._leaving.set()
        with self._limited():
            self._take_leave()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Ends this process if the host of the store hangs; torch itself would wait forever."""
        limit = threading.Timer(self.silence_limit_s, self._end, [self._unreachable])
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def _end(self, lost: LostProcess) -> None:
        logger.error("%s. This process ends; rerun the command to resume from the newest checkpoint", lost.text)
        try:
            if lost is not self._unreachable:
                with self._limited():
                    self._take_leave(lost)  # the others read from the store which process is lost
        finally:
            os._exit(PROCESS_LOST)

    def _take_leave(self, lost: LostProcess | None = None) -> None:
        """Announces that this process ends.

        The main process then waits up to `GRACE_S` for all responsive processes to announce the same.
        """
        with suppress(dist.DistError):  # the host of the store may have left before
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:  # it may host the store, which the others still read
                silent = lost.rank if lost is not None and lost.silent else None
                awaited = [f"left/{rank}" for rank in self.others if rank != silent]
                deadline = time.monotonic() + GRACE_S
                while awaited and time.monotonic() < deadline and not self._store.check(awaited):
                    time.sleep(PERIOD_S / 10)

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"count/{self.rank}", str(self._count))

    def _complain(self, error: BaseException) -> None:
        """Tells the others about an error here, so that they end unless they meet the same one themselves."""
        complaint = LostProcess(self.rank, f"{self._name} stopped: {type(error).__name__}: {error}", silent=False)
        with suppress(dist.DistError):  # without a store nobody can be told
            self._store.compare_set("complaint", "", json.dumps(complaint))  # the first complaint is kept

    def _watch(self) -> None:
        while not self._leaving.wait(PERIOD_S):
            try:
                with self._limited():
                    self._beat()
                    lost = self._find_lost_process()
            except dist.DistError:
                lost = self._unreachable
            if lost is None or self._leaving.is_set():
                continue
            if lost.rank == self.rank and self._failed and not lost.silent:
                return  # the main thread raises the error itself
            self._end(lost)

    def _find_lost_process(self) -> LostProcess | None:
        if self._store.check(["lost"]):
            return LostProcess(*json.loads(self._store.get("lost")))
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
                is_lost = now - since > self.silence_limit_s
            else:  # the process that complained is alive; the silence of another one would explain its error
                is_lost = rank != complaint.rank and now - max(since, self._complained_s) > GRACE_S
            if is_lost:
                return self._announce(LostProcess(rank, f"{self._names[rank]} has been silent for {now - since:.0f} s"))
        if complaint is not None:
            has_left = self._store.check([f"left/{complaint.rank}"])  # so the error was its own
            if now - self._complained_s > (PERIOD_S if has_left else 2 * GRACE_S):
                return self._announce(complaint)
        return None

    def _announce(self, lost: LostProcess) -> LostProcess:
        """Announces a lost process to all, unless another was announced first; returns the one announced first.

        A process that announces then ends, so a second announcement would blame that process.
        """
        return LostProcess(*json.loads(self._store.compare_set("lost", "", json.dumps(lost))))
