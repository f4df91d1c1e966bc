"""Faults of the files of a run: the message, the checkpoint that is used, and how the run resumes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from dinov2_eq.config.schema import default_config
from dinov2_eq.files import disk_errors_explained
from dinov2_eq.train.run_folder import write_teacher
from tests.disks import FILLER, mounted_disk, remount
from tests.reliability.faults import PERIOD_STEPS, RUN
from tests.reliability.runs import STEPS

pytestmark = pytest.mark.cluster


def test_a_process_is_killed_during_the_last_save(run, uninterrupted):
    """The others are not training but waiting for the save."""
    assert run.train(fault=f"kill_as_it_writes 1 {STEPS - 1}") == [5, -signal.SIGKILL]
    assert re.search(r"process 1 \(host .+, pid \d+\) has been silent", run.printed(0))
    run.stopped_after(uninterrupted, STEPS - PERIOD_STEPS)


@pytest.mark.parametrize("fault", ["kill_as_it_writes 0 3", "kill_as_it_writes 1 3", "kill_as_it_renames 0 3"])
def test_a_process_is_killed_during_a_save(run, uninterrupted, fault):
    assert sorted(run.train(fault=fault)) == [-signal.SIGKILL, 5]
    if fault.split()[1] == "1":
        run.stopped_after(uninterrupted, 2)  # the main process removed the rest
    else:
        assert run.names_of_checkpoints() == ["2", "4.writing"]
        run.goes_on(uninterrupted, 2)
        assert f"{RUN}/checkpoints/4.writing was never finished; it is ignored" in run.log(0)
        assert run.names_of_checkpoints() == ["2", "4", "6"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint(run, uninterrupted, damage):
    run.copied_from(uninterrupted, 6)
    damage(run.checkpoints / "6" / "__1_0.distcp")
    run.goes_on(uninterrupted, 4)
    what = r"__1_0.distcp is not what was written \(\d+ bytes\)"
    expected = rf"Checkpoint {RUN}/checkpoints/6 is damaged \({what}\); trying the one before it"
    assert re.search(expected, run.log(0))


def test_every_checkpoint_is_damaged(run, uninterrupted):
    run.copied_from(uninterrupted, 4)
    for step in ("2", "4"):
        truncate(run.checkpoints / step / "__0_0.distcp")
    assert run.train() == [2, 2]
    assert re.search(
        r"No checkpoint of this run can be resumed from:\n +run/checkpoints/4: .*\n +run/checkpoints/2:"
        r".*\nRestore one of these folders, or start over with --no-resume",
        run.printed(0),
    )
    assert run.names_of_checkpoints() == ["2", "4"]


def test_clocks_that_disagree(run, uninterrupted):
    """Checkpoints are ordered by step, and dates of files do not matter."""
    run.copied_from(uninterrupted, 4)
    day, now = 24 * 3600, time.time()
    for days, path in enumerate(sorted((run.folder / RUN).rglob("*"), reverse=True)):
        os.utime(path, (now + days * day, now + days * day))
    os.utime(run.checkpoints / "4", (0, 0))
    run.goes_on(uninterrupted, 4)


def test_the_disk_of_the_checkpoints_is_full(run, uninterrupted):
    with mounted_disk(run.checkpoints, megabytes=64):
        assert run.train(fault="fill_checkpoints 0 3") == [2, 2]
        reason = r"could not be written: No space left on device \(process \d\)\. Older checkpoints are intact"
        assert len(re.findall(rf" E .*Checkpoint {RUN}/checkpoints/4 {reason}", run.printed(0))) == 1
        for rank in (0, 1):
            assert re.search(rf"dinov2-eq: Checkpoint {RUN}/checkpoints/6 {reason}", run.printed(rank))
        assert run.names_of_checkpoints() == ["2", FILLER]
        (run.checkpoints / FILLER).unlink()
        run.goes_on(uninterrupted, 2)


def test_the_disk_of_the_run_is_full(run, uninterrupted):
    reason = f"{RUN} cannot be written any more: No space left on device. Its checkpoints are intact"
    with mounted_disk(run.folder / RUN, megabytes=64) as disk:
        for fault in ("fill_run 0 5", ""):  # the disk is still full at the second start
            assert run.train(fault=fault) == [2, 5]
        assert run.printed(0).count(f"dinov2-eq: {reason}") == 2
        assert len(re.findall(rf"process 0 \(.+\) stopped: OSError: {reason}", run.printed(1))) == 2
        (disk / FILLER).unlink()
        run.goes_on(uninterrupted, 4)


def test_the_teacher_does_not_fit_on_the_disk(tmp_path):
    with mounted_disk(tmp_path / "run", megabytes=1) as disk:
        with pytest.raises(OSError, match="run cannot be written any more: No space left"), disk_errors_explained(disk):
            write_teacher(disk, torch.nn.Linear(1000, 1000), default_config(), step=1)
        assert not list(disk.rglob("*.pth"))


def test_a_read_only_folder(run):
    with mounted_disk(run.folder / RUN, megabytes=1) as disk:
        remount(disk, "ro")
        assert run.train() == [2, 2]
        for rank in (0, 1):
            assert f"{RUN} cannot be written (Read-only file system); choose another --output-dir" in run.printed(rank)
