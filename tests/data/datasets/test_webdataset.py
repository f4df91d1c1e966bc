"""Tar shards packed as for WebDataset, compared with a slow reading by tarfile; and all kinds of mistakes."""

import gzip
import io
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from dinov2_eq.data.datasets import DataError, UnreadableImage, build_dataset, require_labels
from dinov2_eq.data.datasets.webdataset import expand_braces, list_shards
from tests.data.datasets.tars import number_of, picture, write_shards, write_tar


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


@pytest.mark.parametrize("content", [b"cat", b"9" * 30, b"", b"1.5"])
def test_training_needs_no_usable_labels(tmp_path, content):
    files = {"0.png": picture(0), "0.cls": b"7", "1.png": picture(1), "1.cls": content, "2.cls": b"dog"}
    string = f"WebDataset:urls={write_tar(tmp_path / 'a.tar', files)}"
    for _ in range(2):  # scanned, and from the index
        dataset = build_dataset(string)
        assert number_of(dataset, 1) == 1
        message = (
            rf"k-NN needs labels.*a\.tar/1\.cls holds {content!r}; a label must be a whole number.*label=<extension>"
        )
        with pytest.raises(DataError, match=message.replace("b'", "b.")):
            require_labels(dataset, "k-NN")


# which files are images


def images_of(path, options=""):
    """The numbers of the pictures that the dataset reads."""
    dataset = build_dataset(f"WebDataset:urls={path}{options}")
    return [number_of(dataset, index) for index in range(len(dataset))]


@pytest.mark.parametrize(
    "names",
    [
        ["img_5.png", "img_6.png", "img_6.5.png"],
        ["scan v1.0.png", "scan v1.1.png", "a.b/scan v2.0.png"],
        ["1.2.840.113.png", "1.2.840.114.png", "1.png"],
        ["./photo.of.a.cat.PNG", "photo.of.a.dog.png"],
        ["0001.5.png", "0001.jpg"],
    ],
)
def test_names_may_hold_dots(tmp_path, caplog, names):
    path = write_tar(tmp_path / "a.tar", {name: picture(number) for number, name in enumerate(names)})
    assert images_of(path) == list(range(len(names)))
    assert not [message for message in caplog.messages if "skipped" in message]


def test_labels_of_names_with_dots(tmp_path):
    names = {"a.1.png": b"1", "a.2.cls": b"2", "a.2.png": b"", "b.3.png": b"", "b.cls": b"3"}
    files = {name: picture(0) if name.endswith("png") else content for name, content in names.items()}
    files["a.1.cls"] = b"1"
    dataset = build_dataset(f"WebDataset:urls={write_tar(tmp_path / 'a.tar', files)}")
    assert dataset.labels.tolist() == [1, 2, 3]


def warnings_of(path, caplog, options=""):
    """Returns what the first start logs; the second one, which reads the index, must log the same."""
    logged = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build_dataset(f"WebDataset:urls={path}{options}")
        logged.append(caplog.messages)
    assert logged[0] == logged[1]
    return logged[0]


def test_parts_of_a_sample_are_left_out_and_named(tmp_path, caplog):
    for shard in range(2):
        files = {f"{n}.{part}": picture(n) for n in range(3) for part in ("jpg", "seg.png", "depth.png")}
        write_tar(tmp_path / f"{shard}.tar", files)
    assert images_of(tmp_path / "0.tar") == [0, 1, 2]
    (warning,) = warnings_of(f"{tmp_path}/*.tar", caplog)
    example = f"such as {tmp_path}/0.tar/0.seg.png; image=seg.png reads these instead)"
    assert f"skipped: additional images of a sample (12, {example}" in warning
    (warning,) = warnings_of(f"{tmp_path}/*.tar", caplog, ":image=seg.png")
    assert f"images whose extension is not seg.png (12, such as {tmp_path}/0.tar/0.jpg)" in warning


def test_samples_with_several_images_are_named(tmp_path, caplog):
    files = {f"{n}.{part}.png": picture(n) for n in range(3) for part in ("left", "right")}
    path = write_tar(tmp_path / "a.tar", files | {"photo.of.me.png": picture(9)})
    assert images_of(path) == [0, 0, 1, 1, 2, 2, 9]
    (warning,) = warnings_of(path, caplog)
    assert f"6 images share their sample with other images, such as {path}/0.left.png" in warning
    assert "image=left.png reads one of each sample" in warning
    assert images_of(path, ":image=left.png") == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".1.png", "hidden image files"),
        ("in/1.psd", "image files of kinds that are not read here"),
        ("in/1", "images without a usual ending"),
        ("n01.tar", "archives"),
        ("1.cls", "labels without an image"),
    ],
)
def test_other_files_are_counted_and_named(tmp_path, caplog, name, words):
    path = write_tar(tmp_path / "a.tar", {"0.png": picture(0), name: picture(1), "0.json": b"{}", "._0.png": b"x"})
    (warning,) = warnings_of(path, caplog)
    assert f"{path}: skipped: {words} (1, such as {path}/{name})." in warning


def add_link(tar, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def test_links_are_followed(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", {"in/0.png": picture(5), "blobs/x": b"4"})
    with tarfile.open(path, "a") as tar:
        add_link(tar, "in/1.png", "in/0.png", tarfile.LNKTYPE)
        add_link(tar, "in/2.png", "0.png", tarfile.SYMTYPE)
        add_link(tar, "3.png", "./in/../in/2.png", tarfile.SYMTYPE)
        add_link(tar, "3.cls", "blobs/x", tarfile.SYMTYPE)
        add_link(tar, "4.png", "nowhere.png", tarfile.SYMTYPE)
        add_link(tar, "5.png", "5.png", tarfile.SYMTYPE)
        add_link(tar, "6.png", "nowhere.png", tarfile.LNKTYPE)
        add_link(tar, "7.png", "", tarfile.FIFOTYPE)
    assert images_of(path) == [5, 5, 5, 5]
    assert build_dataset(f"WebDataset:urls={path}").labels.tolist() == [-1, -1, -1, 4]
    (warning,) = warnings_of(path, caplog)
    assert f"broken links and special files (4, such as {path}/4.png)" in warning


def test_sparse_images_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = 512
        member.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "1024", "GNU.sparse.numblocks": "1"}
        tar.addfile(member, io.BytesIO(bytes(512)))
    with pytest.raises(DataError, match=r"a\.tar/0\.png is stored as a sparse file.*without --sparse"):
        build_dataset(f"WebDataset:urls={path}")


def test_joined_tars_are_refused(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", {f"{n}.png": picture(n)}).read_bytes() for n in range(2)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    with pytest.raises(
        DataError, match=r"both\.tar has data after the end of its archive, at byte 1024.*--concatenate"
    ):
        build_dataset(f"WebDataset:urls={tmp_path}/both.tar")
    (tmp_path / "both.tar").write_bytes(parts[0] + bytes(3_000_001))
    assert images_of(tmp_path / "both.tar") == [0]


# class tars


def test_imagenet22k_is_a_folder_of_class_tars(tmp_path, caplog):
    for number, wnid in enumerate(["n03", "n01"]):
        files = {f"{wnid}_{n}.JPEG": picture(10 * number + n) for n in range(2 + number)}
        write_tar(tmp_path / "in{1,2}" / f"{wnid}.tar", files)
    (tmp_path / "in{1,2}" / "n02.tar.gz").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        dataset = build_dataset(f"ImageNet22k:root={tmp_path}/in{{1,2}}:extra=/no/where")
    assert [number_of(dataset, index) for index in range(5)] == [10, 11, 12, 0, 1]
    assert require_labels(dataset, "k-NN").tolist() == [0, 0, 0, 1, 1] and dataset.class_names == ["n01", "n03"]
    assert "with a class for each tar file; extra=/no/where is not needed" in caplog.messages[0]
    assert "archives (1, such as n02.tar.gz)" in caplog.messages[1]
    assert pickle.loads(pickle.dumps(dataset)).labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(DataError, match=r"ImageNet22k needs root=\.\.\., as in 'ImageNet22k:root=\.\.\.'"):
        build_dataset("ImageNet22k:extra=/no/where")
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        build_dataset(f"ImageNet22k:root={tmp_path}")


def test_class_tars_that_are_broken_links_or_special_files(tmp_path, caplog):
    write_tar(tmp_path / "n01.tar", {"1.png": picture(3)})
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "n02.tar.gz")
    dataset = build_dataset(f"ImageNet22k:root={tmp_path}")
    assert len(dataset) == 1 and dataset.class_names == ["n01"]
    assert "broken links and special files (1, such as n02.tar.gz)" in caplog.text
    (tmp_path / "n00.tar").symlink_to(tmp_path / "nowhere.tar")
    with pytest.raises(DataError, match=r"n00\.tar is a broken link or not a regular file; restore or remove it"):
        build_dataset(f"ImageNet22k:root={tmp_path}")


# what can be wrong


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("'https://host/a.tar'", "'https://host/a.tar' is not a path.*download them or mount"),
        ("'s3://bucket/a-{0..3}.tar'", "is not a path"),
        ("'pipe:curl x'", "is not a path"),
        ("/nowhere/*.tar", r"no shard matches /nowhere/\*\.tar"),
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
    with pytest.raises(DataError, match=r"a\.tar is (truncated|not a complete tar file).*Write or copy it again"):
        build_dataset(f"WebDataset:urls={path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete tar file: empty file"),
        (b"no tar at all" * 100, "is not a complete tar file"),
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
        ({"1.png": b"", "1.jpg": b""}, r"two images for the sample '1', 1\.png and 1\.jpg\. Choose one with image="),
        ({"1.x.png": b"", "1.x.jpg": b""}, r"two images for the sample '1\.x', 1\.x\.png and 1\.x\.jpg"),
        (
            {".1.png": b"", "2.tar": b""},
            r"are: tar\); skipped: hidden image files \(1, such as \.1\.png\); archives",
        ),
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
