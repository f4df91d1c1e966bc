"""Files are written completely or not at all."""

import errno
import os
import subprocess

import pytest

from dinov2_eq.files import (
    as_written,
    check_types,
    check_writable,
    file_sha256,
    read_errors_named,
    read_json,
    replace_text,
    whole_file,
)
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


def test_what_a_killed_process_left_behind_is_removed_after_a_day(tmp_path):
    kept, old = ["a.json.89abcdef.writing", "12.replaced.writing"], "a.json.01234567.writing"
    for name in (*kept, old):
        (tmp_path / name).write_text("")
    for name in (kept[1], old):
        os.utime(tmp_path / name, (0, 0))
    replace_text(tmp_path / "a.json", "{}")
    assert names(tmp_path) == sorted(["a.json", *kept])


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


def test_names_that_are_not_utf_8_are_written_escaped(tmp_path):
    replace_text(tmp_path / "page.html", "caf\udce9 é")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "caf\\udce9 é"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON, or it was cut off"),
        (b'{"a": 1', "is not JSON, or it was cut off"),
        (b'{"a": "\xff"}', "is not JSON, or it was cut off"),
        (bytes(20), "is not JSON, or it was cut off"),
        (b"[" * 200_000, "is not JSON, or it was cut off"),
        (b"[1, 2]", "holds '\\[1, 2\\]', not a table"),
        (b"null", "holds 'None', not a table"),
        (b'"word"', "holds 'word', not a table"),
    ],
)
def test_json_that_is_no_table_is_named(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/file.json {reason}"):
        read_json(tmp_path / "file.json")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file\.json"):
        read_json(tmp_path / "file.json")
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'file.json'$"), read_errors_named("file.json"):
        raise OSError(errno.EIO, "Input/output error")
    with (
        pytest.raises(ValueError, match=r"^a.json is not as this version writes it \(KeyError: 'b'\)"),
        as_written("a.json"),
    ):
        {}["b"]


def test_a_value_of_another_type_is_named():
    check_types([1, 2.5], int | float)
    with pytest.raises(TypeError, match=r"^'None' is of type NoneType$"):
        check_types([1, None], int | float)


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10000)  # more than one piece
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert file_sha256(path) == printed.split()[0]
