"""One run at a time in a folder, whatever node it is on."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from dinov2_eq.exits import MISTAKE, end_process
from dinov2_eq.waiting import waiting_for

BEAT_S = 5.0
SILENCE_S = 3 * BEAT_S  # of a record of another node, until its run counts as dead
RECORD_BYTES = 512  # fixed, so that a reader never sees half a record

logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another run that is alive writes to the folder."""


class FolderLock:
    """The right to write checkpoints to a folder; a context manager that gives it back.

    The kernel releases the lock when its owner ends, however it ends. Whether other nodes see the lock is up to the
    file system. So the file also names the owner, who writes it anew every `BEAT_S` seconds: while the record of a run
    on another node changes, that run is alive.

    Args:
        folder: exists; the lock is its file `.lock`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: int | None = None
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._leaving = threading.Event()

    def __enter__(self) -> "FolderLock":
        return self

    def acquire(self) -> None:
        """Takes the lock; one process of a run calls it.

        Raises:
            FolderInUse: another run has it.
            OSError: the file cannot be written.
        """
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_kernel_lock = self._lock(file)
            left = _read(file)
            if left is not None and not (has_kernel_lock and left.get("boot") == _boot()):
                self._watch_another_node(left)
                self._lock(file)  # closing the file anywhere in the process has given it back
            self._record = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "boot": _boot(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "run": uuid4().hex,
                "beats": 0,
            }
            _write(file, self._record)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._leaving.set()
        self._thread.join(BEAT_S)
        if self._thread.is_alive():  # it waits for a disk that does not answer
            return
        with suppress(OSError):
            if self._is_ours(_read(self._file)):
                os.ftruncate(self._file, 0)  # nobody has to wait whether the record changes
        os.close(self._file)

    def _lock(self, file: int) -> bool:
        """Whether the file system has locks; raises FolderInUse where another process has this one."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, which data-loading processes would inherit
        except (BlockingIOError, PermissionError):
            raise self._in_use(_read(file) or {}) from None
        except OSError:
            return False
        return True

    def _watch_another_node(self, left: dict[str, Any]) -> None:
        """Raises FolderInUse where the record changes."""
        what = (
            f"a sign of life from the run on {left.get('host', 'another host')}, which {self.path} names and which did "
            "not end cleanly"
        )
        deadline = time.monotonic() + SILENCE_S
        with waiting_for(what, tell_after_s=0, patience_s=1):
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 10)
                with self.path.open("rb") as fresh:  # opened anew: network file systems then ask their server
                    if _parse(fresh.read(RECORD_BYTES)) != left:
                        raise self._in_use(left)

    def _in_use(self, owner: dict[str, Any]) -> FolderInUse:
        who = "another process"
        if owner.keys() >= {"pid", "host", "since"}:
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        return FolderInUse(
            f"{self.path.parent} is in use by {who}. End that run, or choose another --output-dir. Processes that are "
            "to train together are started by torchrun or srun"
        )

    def _beat(self) -> None:
        while not self._leaving.wait(BEAT_S):
            try:
                found = _read(self._file)
                if found is not None and not self._is_ours(found):
                    end_process(MISTAKE, f"{self._in_use(found)}")
                self._record["beats"] += 1
                _write(self._file, self._record)
            except OSError as error:  # a full disk stops the run at something that matters
                logger.debug("%s: %s", self.path, error)

    def _is_ours(self, record: dict[str, Any] | None) -> bool:
        return record is not None and record.get("run") == self._record["run"]


def _boot() -> str:
    """Which start of which machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(file: int) -> dict[str, Any] | None:
    return _parse(os.pread(file, RECORD_BYTES, 0))


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write(file: int, record: dict[str, Any]) -> None:
    os.pwrite(file, json.dumps(record).encode().ljust(RECORD_BYTES), 0)
    os.fsync(file)
