"""Checkpoints after a killed process, a full disk and an unwritable folder."""

import logging
import subprocess
import sys

import pytest
import torch

from dinov2_eq.checkpointer import Checkpointer
from tests.disks import fill, remount

KILLED = """
import sys, time, torch
from pathlib import Path
from dinov2_eq.checkpointer import Checkpointer

class Slow:
    def __reduce__(self):
        print("writing", flush=True)
        time.sleep(60)
        return int, (0,)

checkpointer = Checkpointer(Path(sys.argv[1]), keep=2)
for step in (1, 2):
    checkpointer.save(step, {"model": {"weight": torch.full((1000,), float(step))}})
checkpointer.save(3, {"model": {"weight": torch.zeros(1000)}, "slow": Slow()})
time.sleep(60)
"""


def state(value, size):
    return {"model": {"weight": torch.full((size,), float(value))}}


SMALL, TOO_LARGE = 1000, 500_000  # float32 values, on a disk of 1 MiB


def require(folder, step, value):
    """Checks that a new process would resume from `step`."""
    checkpointer = Checkpointer(folder, keep=2)
    assert checkpointer.newest_whole() == step
    loaded = state(0, SMALL)
    checkpointer.load(step, loaded)
    assert loaded["model"]["weight"].eq(value).all()


@pytest.mark.cluster
def test_killed_during_a_save(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert (tmp_path / "3.writing").is_dir() and process.returncode == -9
    require(tmp_path, 2, 2)
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(3, state(3, SMALL))
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_training_goes_on_when_the_disk_is_full(small_disk, caplog):
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=2)
    for step, size in ((1, SMALL), (2, TOO_LARGE), (3, TOO_LARGE), (4, SMALL)):
        checkpointer.save(step, state(step, size))
    checkpointer.wait()
    ours = (record for record in caplog.records if record.name == "dinov2_eq.checkpointer")
    errors = [record.getMessage() for record in ours if record.levelno == logging.ERROR]
    assert len(errors) == 2
    for step, error in zip((2, 3), errors, strict=True):
        assert f"checkpoints/{step} could not be written: No space left on device. Older" in error
    assert checkpointer.steps() == [1, 4]
    require(checkpointer.folder, 4, 4)


def test_a_full_disk_at_the_end_is_an_error(small_disk):
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=1)
    checkpointer.save(1, state(1, SMALL))
    checkpointer.save(2, state(2, TOO_LARGE))
    with pytest.raises(OSError, match=r"checkpoints/2 could not be written: No space left on device\. Older .* intact"):
        checkpointer.wait()
    assert [path.name for path in checkpointer.folder.iterdir()] == ["1"]
    require(checkpointer.folder, 1, 1)
    checkpointer.wait()  # said once
    checkpointer.close()


def test_a_disk_too_full_for_a_folder(small_disk):
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=1)
    checkpointer.save(1, state(1, SMALL))
    checkpointer.wait()
    fill(small_disk)
    checkpointer.save(2, state(2, SMALL))
    with pytest.raises(OSError, match="2 could not be written: No space left on device"):
        checkpointer.wait()
    require(checkpointer.folder, 1, 1)


def test_a_folder_that_became_read_only(small_disk, caplog):
    checkpointer = Checkpointer(small_disk / "checkpoints", keep=2)
    checkpointer.save(1, state(1, SMALL))
    checkpointer.wait()
    remount(small_disk, "ro")
    checkpointer.save(2, state(2, SMALL))
    checkpointer.save(3, state(3, SMALL))
    assert "checkpoints/2 could not be written: Read-only file system" in caplog.text
    with pytest.raises(OSError, match="checkpoints/3 could not be written: Read-only file system"):
        checkpointer.wait()
    require(checkpointer.folder, 1, 1)


def test_a_folder_that_cannot_be(tmp_path, caplog):
    (tmp_path / "file").touch()
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", keep=1)
    checkpointer.save(1, state(1, SMALL))
    checkpointer.close()
    assert "checkpoints/1 could not be written: Not a directory" in caplog.text
