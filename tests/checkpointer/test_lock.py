"""One run at a time in a folder: on this machine by the kernel's lock, on several by a record that changes."""

import errno
import json
import os
import threading
import time

import pytest

from dinov2_eq.checkpointer import lock as module
from dinov2_eq.checkpointer.lock import FolderInUse, FolderLock
from tests.processes import run_ranks, start_ranks


def hold(folder, seconds):
    with FolderLock(folder) as lock:
        lock.acquire()
        (folder / "taken").touch()
        time.sleep(seconds)


def try_to_take(folder):
    try:
        with FolderLock(folder) as lock:
            lock.acquire()
    except FolderInUse as error:
        return str(error)
    return "taken"


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    ((holder,), _) = start_ranks(hold, 1, tmp_path, 60)
    wait_for(tmp_path / "taken")
    try:
        message = try_to_take(tmp_path)
        assert message.startswith(f"{tmp_path} is in use by process {holder.pid} on {os.uname().nodename}, since 20")
        assert "choose another --output-dir" in message and "torchrun or srun" in message
    finally:
        holder.kill()
    holder.join()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid  # it could not clean up
    assert try_to_take(tmp_path) == "taken"


def test_a_run_that_ends_leaves_no_record(tmp_path):
    assert run_ranks(hold, 1, tmp_path, 0) == [None]
    assert (tmp_path / ".lock").read_bytes() == b""
    assert try_to_take(tmp_path) == "taken"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The record of a run on another node, on a file system that does not share locks."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    record = {"host": "node7", "pid": 7, "boot": "another", "since": "2030-01-01 00:00:00", "run": "theirs", "beats": 3}
    path = tmp_path / ".lock"
    path.write_text(json.dumps(record).ljust(module.RECORD_BYTES))
    return path, record


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_run_on_another_node_is_alive_as_long_as_its_record_changes(elsewhere, tmp_path, monkeypatch, has_locks):
    if not has_locks:
        monkeypatch.setattr(module.fcntl, "lockf", lambda *_: os.open("/no/such/file", os.O_RDONLY))
    monkeypatch.setattr(module, "SILENCE_S", 60)
    path, record = elsewhere

    def beat():
        time.sleep(0.2)
        path.write_text(json.dumps(record | {"beats": 4}).ljust(module.RECORD_BYTES))

    beating = threading.Thread(target=beat)
    beating.start()
    assert "is in use by process 7 on node7, since 2030-01-01" in try_to_take(tmp_path)
    beating.join()
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    assert try_to_take(tmp_path) == "taken"  # nothing changes any more


def test_a_folder_that_was_taken_over_is_locked(elsewhere, tmp_path):
    """Reading the record opens and closes the file, which releases the kernel's lock."""
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        (message,) = run_ranks(try_to_take, 1, tmp_path)
    assert f"is in use by process {os.getpid()} on" in message


def test_a_run_whose_folder_was_taken_over_ends(elsewhere, tmp_path, monkeypatch):
    """This happens when a run was suspended and another node took it for dead."""
    ended = threading.Event()
    told = []

    def end(code, text):
        told.append((code, text))
        ended.set()

    monkeypatch.setattr(module, "end_process", end)
    path, record = elsewhere
    path.write_bytes(b"")
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        with path.open("r+b") as file:
            file.write(json.dumps(record).ljust(module.RECORD_BYTES).encode())
        assert ended.wait(10)
    code, text = told[0]
    assert code == 2 and "is in use by process 7 on node7" in text


def test_who_lost_the_folder_leaves_the_record_of_its_owner(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 60)
    path, record = elsewhere
    theirs = json.dumps(record).ljust(module.RECORD_BYTES)
    path.write_bytes(b"")
    with FolderLock(tmp_path) as lock:
        lock.acquire()
        with path.open("r+b") as file:
            file.write(theirs.encode())
    assert path.read_text() == theirs


def test_a_full_disk(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"), FolderLock(tmp_path) as lock:
        patch.setattr(module.os, "fsync", fail)
        lock.acquire()
    assert run_ranks(try_to_take, 1, tmp_path) == ["taken"]


def test_nothing_that_could_be_a_record(tmp_path):
    for content in (b"", b"\0" * 600, b"[1]", "é".encode("latin-1")):
        (tmp_path / ".lock").write_bytes(content)
        assert try_to_take(tmp_path) == "taken"
