"""Files are written whole or not at all."""

import errno
import subprocess

import pytest

from dinov2_eq.files import check_writable, file_sha256, replace_text, whole_file
from tests.disks import fill, mounted_disk


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    replace_text(path, "é")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("a pa")
        raise KeyboardInterrupt
    assert path.read_bytes() == "é".encode() and names(tmp_path) == ["results.json"]


def test_of_two_writers_the_last_one_wins_and_neither_fails(tmp_path):
    path = tmp_path / "results.json"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first" and names(tmp_path) == ["results.json"]


def test_a_full_disk_keeps_the_file(tmp_path):
    with mounted_disk(tmp_path / "disk", megabytes=1) as disk:
        replace_text(disk / "results.json", "before")
        fill(disk)
        with pytest.raises(OSError) as caught:
            replace_text(disk / "results.json", "after" * 10000)
        assert caught.value.errno == errno.ENOSPC
        assert (disk / "results.json").read_text() == "before" and names(disk) == ["filler", "results.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/results cannot be written \(Not a directory\); choose another --output-dir"
    ):
        check_writable(tmp_path / "file" / "results")
    check_writable(tmp_path / "new" / "results")
    assert names(tmp_path / "new" / "results") == []


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10000)  # more than one piece
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert file_sha256(path) == printed.split()[0]
