"""A lock that allows one run at a time in a folder, also across nodes."""

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
SILENCE_S = 3 * BEAT_S  # a run on another node counts as dead if its record does not change for this long
RECORD_BYTES = 512  # fixed, so that a reader never sees part of a record

logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another live run writes to the folder."""


class FolderLock:
    """The exclusive right to write checkpoints to a folder; a context manager that releases it on exit.

    The kernel releases the lock when its owner ends for any reason, but some file systems do not show locks to other
    nodes. The file therefore also names the owner, which rewrites it every `BEAT_S` seconds. As long as the record of
    a run on another node changes, that run is alive.

    Args:
        folder: an existing folder; the lock is the file `.lock` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: int | None = None
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._leaving = threading.Event()

    def __enter__(self) -> "FolderLock":
        return self

    def acquire(self) -> None:
        """Acquires the lock; only one process of a run calls it.

        Raises:
            FolderInUse: another run holds it.
            OSError: the file cannot be written.
        """
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_kernel_lock = self._lock(file)
            earlier = _read(file)
            if earlier is not None and not (has_kernel_lock and earlier.get("boot") == _boot_id()):
                self._watch_another_node(earlier)
                self._lock(file)  # again, because closing the file anywhere in the process has released it
            self._record = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "boot": _boot_id(),
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
        if self._thread.is_alive():  # it waits for a disk that does not respond
            return
        with suppress(OSError):
            if self._is_ours(_read(self._file)):
                os.ftruncate(self._file, 0)  # spares the next run the wait for a change of the record
        os.close(self._file)

    def _lock(self, file: int) -> bool:
        """Takes the kernel lock; returns False if the file system has no locks.

        Raises:
            FolderInUse: another process holds it.
        """
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `flock`, which data-loading processes would inherit
        except (BlockingIOError, PermissionError):
            raise self._in_use(_read(file) or {}) from None
        except OSError:
            return False
        return True

    def _watch_another_node(self, earlier: dict[str, Any]) -> None:
        """Raises FolderInUse if the record changes within `SILENCE_S`."""
        what = (
            f"a sign of life from the run on {earlier.get('host', 'another host')}, which according to {self.path} did "
            "not end cleanly"
        )
        deadline = time.monotonic() + SILENCE_S
        with waiting_for(what, tell_after_s=0, patience_s=1):
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 10)
                with self.path.open("rb") as fresh:  # opened again, so that network file systems ask their server
                    if _parse(fresh.read(RECORD_BYTES)) != earlier:
                        raise self._in_use(earlier)

    def _in_use(self, owner: dict[str, Any]) -> FolderInUse:
        who = "another process"
        if owner.keys() >= {"pid", "host", "since"}:
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        return FolderInUse(
            f"{self.path.parent} is in use by {who}. End that run, or choose another --output-dir. To train with "
            "several processes, start them with torchrun or srun"
        )

    def _beat(self) -> None:
        while not self._leaving.wait(BEAT_S):
            try:
                current = _read(self._file)
                if current is not None and not self._is_ours(current):
                    end_process(MISTAKE, f"{self._in_use(current)}")
                self._record["beats"] += 1
                _write(self._file, self._record)
            except OSError as error:  # a full disk fails again, and is reported, when the run writes its own files
                logger.debug("%s: %s", self.path, error)

    def _is_ours(self, record: dict[str, Any] | None) -> bool:
        return record is not None and record.get("run") == self._record["run"]


def _boot_id() -> str:
    """Identifies this machine since it was last started."""
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
