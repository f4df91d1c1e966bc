"""The index of tar files is kept for the next start, rebuilt if it does not fit, and optional."""

import logging
import os
import pwd

import pytest

from dinov2_eq.data.datasets import build_dataset, tar_index
from tests.data.datasets.tars import number_of, picture, write_shards, write_tar


@pytest.fixture
def scanned(monkeypatch):
    """The shards that were scanned instead of read from an index."""
    paths, scan = [], tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda path, *options: paths.append(path) or scan(path, *options))
    return paths


def test_a_second_start_scans_nothing(tmp_path, scanned):
    string = f"WebDataset:urls={write_shards(tmp_path / 'data')}"
    first = build_dataset(string)
    assert len(scanned) == 3
    second = build_dataset(string)
    assert len(scanned) == 3
    assert second.labels.tolist() == first.labels.tolist()
    assert [number_of(second, index) for index in range(12)] == list(range(12))
    build_dataset(string + ":label=id")  # has an index of its own
    build_dataset(string)
    assert len(scanned) == 6
    left = {path.name for path in (tmp_path / "data" / tar_index.INDEX_FOLDER).iterdir()}
    assert left == {f"train-000{shard}.tar.any.{label}" for shard in range(3) for label in ("cls", "id")}


def test_a_changed_shard_is_scanned_again(tmp_path, scanned):
    string = f"WebDataset:urls={write_shards(tmp_path / 'data')}"
    build_dataset(string)
    path = tmp_path / "data" / "train-0001.tar"
    before = os.stat(path)
    write_tar(path, {"1.png": picture(100), "1.cls": b"8", "2.png": picture(101), "2.cls": b"9"})
    dataset = build_dataset(string)
    assert scanned[3:] == [str(path)]
    assert [number_of(dataset, index) for index in (3, 4, 5, 6)] == [3, 100, 101, 8]
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the same size at another time
    build_dataset(string)
    assert scanned[4:] == [str(path)]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_index_is_made_again(tmp_path, scanned, damage):
    string = f"WebDataset:urls={write_shards(tmp_path / 'data', num_shards=1)}"
    build_dataset(string)
    (index,) = (tmp_path / "data" / tar_index.INDEX_FOLDER).iterdir()
    content = bytearray(index.read_bytes())
    whole = bytes(content)
    content[60] ^= 1
    index.write_bytes({"truncated": whole[:-24], "flipped": bytes(content), "empty": b""}[damage])
    assert [number_of(build_dataset(string), number) for number in range(4)] == [0, 1, 2, 3]
    assert len(scanned) == 2
    assert index.read_bytes() == whole


def test_an_index_that_cannot_lie_beside_the_shards(tmp_path, cache_folder, scanned, caplog):
    string = f"WebDataset:urls={write_shards(tmp_path / 'data', num_shards=1)}"
    (tmp_path / "data" / tar_index.INDEX_FOLDER).write_text("in the way, as a read-only folder is for most users")
    build_dataset(string)
    build_dataset(string)
    assert len(scanned) == 1
    assert [path.name for path in cache_folder.glob("dinov2_eq/*/*")] == ["train-0000.tar.any.cls"]

    (indexed,) = cache_folder.glob("dinov2_eq/*")
    indexed.rename(tmp_path / "elsewhere")
    indexed.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert len(build_dataset(string)) == len(build_dataset(string)) == 4
    assert caplog.text.count("cannot be kept") == 1


def test_a_user_without_a_home(tmp_path, scanned, monkeypatch, caplog):
    def no_such_user(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    string = f"WebDataset:urls={write_shards(tmp_path / 'data', num_shards=1)}"
    index = tmp_path / "data" / tar_index.INDEX_FOLDER
    index.write_text("in the way")
    assert len(build_dataset(string)) == 4 and "cannot be kept" in caplog.text
    index.unlink()
    assert len(build_dataset(string)) == len(build_dataset(string)) == 4
    assert len(scanned) == 2
