"""Small disks, for tests of what happens when they are full or read-only."""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


@contextmanager
def mounted_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Makes `folder` a disk of that size; skips the test where nothing can be mounted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"a disk of {megabytes} MiB cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(disk: Path, option: str) -> None:
    """`option` is "ro" (read-only) or "rw"."""
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def fill(disk: Path) -> None:
    """Writes the file `FILLER` until nothing fits any more."""
    with (disk / FILLER).open("wb", buffering=0) as filler:
        for size in (2**20, 2**12):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
