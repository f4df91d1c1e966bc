"""Tar shards as WebDataset packs them, against a slow reading with tarfile; the index; every way to be wrong."""

import gzip
import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dinov2_eq.data.datasets import DataError, UnreadableImage, build_dataset, require_labels, tar_index
from dinov2_eq.data.datasets.webdataset import expand_braces, list_shards


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def scanned(monkeypatch):
    """The shards that were scanned, not read from an index."""
    paths, scan = [], tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda path, *options: paths.append(path) or scan(path, *options))
    return paths


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (number % 256, number // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, num_shards=3, per_shard=4):
    for shard in range(num_shards):
        files = {}
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            files[f"{number:06d}.png"] = picture(number)
            files[f"{number:06d}.cls"] = f"{number % 3}\n".encode()
        write_tar(folder / f"train-{shard:04d}.tar", files)
    return folder / f"train-{{0000..{num_shards - 1:04d}}}.tar"


def number_of(dataset, index):
    red, green, _ = dataset.read(index).getpixel((0, 0))
    return red + 256 * green


def test_samples_are_those_that_a_slow_reading_finds(tmp_path):
    long_name = "deep/" + "x" * 150
    files = {
        "readme.txt": b"about",
        "a/0001.png": picture(1), "b/0001.cls": b"5", "b/0001.png": picture(2), "a/0001.cls": b" 3 ",
        "c.d/0002.PNG": picture(3), "c.d/0002.cls": b"1", "c.d/0002.json": b"{}", "c.d/0002.mask.png": b"no picture",
        f"{long_name}.png": picture(4), f"{long_name}.cls": b"0", ".hidden.png": b"", "._a.png": b"",
        "ü.png": picture(6), "ü.cls": b"4",
    }  # fmt: skip
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        kept = {n: c for n, c in files.items() if format != tarfile.USTAR_FORMAT or len(n) < 100}
        path = write_tar(tmp_path / f"{format}.tar", kept, format=format)
        expected = []
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                folder, _, file_name = member.name.rpartition("/")
                key, _, extension = file_name.partition(".")
                if key and extension.lower() == "png":
                    label = tar.extractfile(os.path.join(folder, f"{key}.cls")).read()
                    expected.append((member.name, tar.extractfile(member).read(), int(label)))
        dataset = build_dataset(f"WebDataset:urls={path}")
        assert len(dataset) == len(expected) == (4 if format == tarfile.USTAR_FORMAT else 5)
        assert dataset.labels.tolist() == [label for *_, label in expected]
        for index, (name, content, _) in enumerate(expected):
            assert (np.asarray(dataset.read(index)) == np.asarray(Image.open(io.BytesIO(content)))).all()
            if name.isascii():
                assert dataset.name(index).startswith(f"{path}/{name[:90]}")


def test_paths_ranges_and_patterns_name_the_same_shards(tmp_path):
    pattern = write_shards(tmp_path / "data")
    for urls in (
        f"{pattern}",
        f"{tmp_path}/data/*.tar",
        f"'{tmp_path}/data/train-0000.tar::{tmp_path}/data/train-000{{1,2}}.tar'",
    ):
        dataset = build_dataset(f"WebDataset:urls={urls}")
        assert [number_of(dataset, index) for index in range(len(dataset))] == list(range(12))
        assert require_labels(dataset, "k-NN").tolist() == [0, 1, 2] * 4
        assert dataset.chunk_ends is None
    assert build_dataset(f"WebDataset:urls={tmp_path}/data/train-0001.tar").name(2).endswith("0001.tar/000006.png")
    assert expand_braces("a{08..10}-{x,y}") == ["a08-x", "a08-y", "a09-x", "a09-y", "a10-x", "a10-y"]


def test_image_and_label_choose_extensions(tmp_path):
    files = {"1.left.png": picture(1), "1.right.png": picture(2), "1.id": b"7", "1.img": picture(3), "1.cls": b"x"}
    path = write_tar(tmp_path / "a.tar", files)
    assert number_of(build_dataset(f"WebDataset:urls={path}:image=right.png:label=none"), 0) == 2
    assert number_of(build_dataset(f"WebDataset:urls={path}:image=.IMG:label=id"), 0) == 3
    assert build_dataset(f"WebDataset:urls={path}:image=img:label=id").labels.tolist() == [7]


def test_missing_labels(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": picture(1), "1.cls": b"4", "2.png": picture(2)})
    with pytest.raises(DataError, match="1 of 2 labels"):
        require_labels(build_dataset(f"WebDataset:urls={path}"), "k-NN")
    path = write_tar(tmp_path / "b.tar", {"1.png": picture(1)})
    with pytest.raises(DataError, match=r"k-NN needs labels.*0001\.cls beside 0001\.jpg.*label="):
        require_labels(build_dataset(f"WebDataset:urls={path}"), "k-NN")


# the index


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


# what can be wrong


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("'https://host/a.tar'", "'https://host/a.tar' is not a path.*download them, or mount"),
        ("'s3://bucket/a-{0..3}.tar'", "is not a path"),
        ("'pipe:curl x'", "is not a path"),
        ("/nowhere/*.tar", r"no shard fits /nowhere/\*\.tar"),
        ("/nowhere/a.tar", "1 of 1 shards are missing: /nowhere/a.tar"),
        ("/nowhere/{3..1}.tar", "cannot read '{3..1}'.*from low to high"),
        ("/nowhere/{one}.tar", "cannot read '{one}'"),
        ("/", r"/ is a folder; .*/\*\.tar"),
        ("/a.tar:image=a/b", "image='a/b' is not an extension"),
    ],
)
def test_wrong_urls(tmp_path, urls, message):
    if "image=" in urls:
        urls = f"{write_shards(tmp_path, num_shards=1)}:image=a/b"
    with pytest.raises(DataError, match=message):
        build_dataset(f"WebDataset:urls={urls}")


def test_a_gap_in_a_range_is_named(tmp_path):
    pattern = write_shards(tmp_path, num_shards=6)
    for shard in (1, 2, 3, 5):
        (tmp_path / f"train-000{shard}.tar").unlink()
    with pytest.raises(DataError, match=r"4 of 6 shards are missing: .*0001\.tar, .*0002\.tar, .*0003\.tar, \.\.\.$"):
        list_shards(str(pattern))


@pytest.mark.parametrize("damage", ["in an image", "in a header", "between files", "header overwritten"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": picture(number) for number in range(3)})
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content = path.read_bytes()
    cut = {"in an image": last.offset_data + 9, "in a header": last.offset + 99, "between files": last.offset}
    if damage in cut:
        path.write_bytes(content[: cut[damage]])
    else:
        path.write_bytes(content[: last.offset] + b"\x01" * 512 + content[last.offset + 512 :])
    with pytest.raises(DataError, match=r"a\.tar is (truncated|not a whole tar file).*Write or copy it again"):
        build_dataset(f"WebDataset:urls={path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole tar file: empty file"),
        (b"no tar at all" * 100, "is not a whole tar file"),
        (gzip.compress(bytes(10240), mtime=0), "is compressed.*gunzip"),
        (bytes(10240), "holds no images .*extensions are: none"),
    ],
)
def test_files_that_are_no_shards(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar " + message):
        build_dataset(f"WebDataset:urls={tmp_path}/a.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.json": b"{}", "1.cls": b"1"}, r"a\.tar holds no images \(looked for \.jpg,.*extensions are: cls, json"),
        ({"1.png": b"", "1.jpg": b""}, r"two images for the sample '1', 1\.png and 1\.jpg\. Choose one by image="),
        ({"1.png": b"", "1.cls": b"cat"}, r"a\.tar/1\.cls holds b'cat'; a label is a whole number.*label=<extension>"),
        ({"1.png": b"", "1.cls": b"9" * 30}, "a label is a whole number"),
    ],
)
def test_shards_with_other_files(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        build_dataset(f"WebDataset:urls={write_tar(tmp_path / 'a.tar', files)}")


def test_unreadable_images_are_named_with_their_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"in/1.png": picture(1), "in/2.png": b"broken"})
    dataset = build_dataset(f"WebDataset:urls={path}")
    assert number_of(dataset, 0) == 1
    with pytest.raises(UnreadableImage, match=r"a\.tar/in/2\.png: UnidentifiedImageError"):
        dataset.read(1)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UnreadableImage, match=r"a\.tar, image at byte \d+: .*has become shorter"):
        dataset.read(1)
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"a\.tar, image at byte \d+: FileNotFoundError"):
        dataset.read(0)


def test_picklable_and_without_open_files(tmp_path):
    dataset = build_dataset(f"WebDataset:urls={write_shards(tmp_path / 'data')}")
    open_before = len(os.listdir("/proc/self/fd"))
    assert number_of(pickle.loads(pickle.dumps(dataset)), 7) == 7
    assert len(os.listdir("/proc/self/fd")) == open_before
