"""Datasets of image files, with other files next to them."""

import logging
import os
import re

import numpy as np
import pytest
from scipy.io import savemat

from dinov2_eq.data.datasets import DataError, build_dataset, require_labels
from dinov2_eq.data.datasets.listing import LeftOut, list_images
from tests.data.datasets.images import COLOURS, colour, encoded, write_image


def test_folder_reads_any_tree(tmp_path):
    write_image(tmp_path / "b" / "deep" / "er" / "x.JPEG", 1)
    write_image(tmp_path / "a.png", 0)
    write_image(tmp_path / "b" / "ü=1:2.png", 2)
    write_image(tmp_path / ".hidden.png", 3)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    dataset = build_dataset(f"Folder:root='{tmp_path}'")
    assert [colour(dataset, index) for index in range(len(dataset))] == [COLOURS[0], COLOURS[1], COLOURS[2]]
    assert dataset.name(2).endswith("ü=1:2.png")
    with pytest.raises(DataError, match=r"k-NN needs labels, and .Folder:root=.*ImageFolder:root="):
        require_labels(dataset, "k-NN")


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        build_dataset(f"Folder:root={tmp_path}")
    with pytest.raises(DataError, match=r"no class folders.*Folder:root="):
        build_dataset(f"ImageFolder:root={tmp_path}")


def test_image_folder_labels_are_ranks_of_folder_names(tmp_path):
    for number, path in enumerate(["cat/1.png", "ant/2.png", "ant/in/3.png"]):
        write_image(tmp_path / path, number)
    (tmp_path / "bee").mkdir()
    dataset = build_dataset(f"ImageFolder:root={tmp_path}")
    assert dataset.class_names == ["ant", "bee", "cat"]
    assert require_labels(dataset, "k-NN").tolist() == [0, 0, 2]
    assert [colour(dataset, index) for index in range(3)] == [COLOURS[1], COLOURS[2], COLOURS[0]]


def make_imagenet(root):
    for number, wnid in enumerate(["n03", "n01", "n02"]):
        write_image(root / "train" / wnid / f"{wnid}_1.JPEG", number)


def test_imagenet_with_class_folders(tmp_path):
    make_imagenet(tmp_path)
    write_image(tmp_path / "val" / "n02" / "ILSVRC2012_val_00000001.JPEG", 3)
    train, val = (build_dataset(f"ImageNet:split={split}:root={tmp_path}") for split in ("TRAIN", "VAL"))
    assert train.class_names == val.class_names == ["n01", "n02", "n03"]
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [1]
    write_image(tmp_path / "val" / "n09" / "ILSVRC2012_val_00000002.JPEG", 3)
    with pytest.raises(DataError, match="n09"):
        build_dataset(f"ImageNet:split=VAL:root={tmp_path}")


def test_imagenet_with_flat_val(tmp_path):
    make_imagenet(tmp_path)
    for number in (1, 2, 3):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    string = f"ImageNet:split=VAL:root={tmp_path}"
    with pytest.raises(DataError, match=r"ILSVRC2012_validation_ground_truth\.txt"):
        require_labels(build_dataset(string), "k-NN")

    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    synsets = [(1, "n03", "c", 0), (2, "n01", "a", 0), (3, "n02", "b", 0), (4, "n00", "all", 3)]
    savemat(devkit / "meta.mat", {"synsets": np.array(synsets, dtype=fields)})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n3\n")
    dataset = build_dataset(string)
    assert require_labels(dataset, "k-NN").tolist() == [0, 2, 1]
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    assert len(build_dataset(string)) == 3  # nobody asks for the labels
    with pytest.raises(DataError, match=r"k-NN needs labels.*has 2 lines.*holds 3 images"):
        require_labels(build_dataset(string), "k-NN")


def test_keys_of_dinov2(tmp_path, caplog):
    make_imagenet(tmp_path)
    with caplog.at_level(logging.INFO):
        dataset = build_dataset(f"ImageNet:split=TRAIN:root={tmp_path}:extra=/no/where")
    assert dataset.labels.tolist() == [0, 1, 2]
    assert caplog.messages == ["extra=/no/where is not needed: the folders themselves are read"]
    with pytest.raises(DataError, match=r"ImageNet needs root=\.\.\., as in 'ImageNet:root=\.\.\.'"):
        build_dataset("ImageNet:split=TRAIN:extra=/no/where")


# what is left out


def length_and_warnings(string, caplog):
    """Returns the number of images, and what was logged."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(string)
    return len(dataset), caplog.messages


def test_nothing_is_said_of_files_that_are_no_images(tmp_path, caplog):
    write_image(tmp_path / "a" / "1.png", 0)
    for name in ("README", "notes.txt", "boxes.json", "._1.png", ".DS_Store", "labels.csv", ".git/config", "P6"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("P6 is no image")
    for string in ("Folder", "ImageFolder"):
        assert length_and_warnings(f"{string}:root={tmp_path}", caplog) == (1, [])


@pytest.mark.parametrize("name", ["a.JPE", "a.jfif", "a.jp2", "a.pbm", "a.dib", "a.apng"])
def test_usual_extensions(tmp_path, caplog, name):
    write_image(tmp_path / name, 1)
    assert length_and_warnings(f"Folder:root={tmp_path}", caplog) == (1, [])


def test_avif_and_jpeg_2000_are_decoded(tmp_path):
    write_image(tmp_path / "a.avif", 5, kind="AVIF")
    write_image(tmp_path / "b.jp2", 5, kind="JPEG2000")
    dataset = build_dataset(f"Folder:root={tmp_path}")
    assert [colour(dataset, index) for index in range(2)] == [COLOURS[5]] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".b.png", r"hidden image files \(1, such as in/\.b\.png\)"),
        (".thumbs/deep/b.png", r"hidden folders with images \(1, such as in/\.thumbs\)"),
        ("b.psd", r"image files of kinds that are not read here \(1, such as in/b\.psd\)"),
        ("b.HEIC", r"image files of kinds that are not read here \(1, such as in/b\.HEIC\)"),
        ("b", r"images without a usual ending \(1, such as in/b\)"),
        ("b.jpg_large", r"images without a usual ending \(1, such as in/b\.jpg_large\)"),
        ("b.png~", r"images without a usual ending \(1, such as in/b\.png~\)"),
        ("b.zip", r"archives \(1, such as in/b\.zip\)"),
        ("b.tar.gz", r"archives \(1, such as in/b\.tar\.gz\)"),
        ("b.zip.001", r"archives \(1, such as in/b\.zip\.001\)"),
        ("b.parquet", r"archives \(1, such as in/b\.parquet\)"),
    ],
)
def test_what_looks_like_an_image_is_counted_and_named(tmp_path, caplog, name, words):
    write_image(tmp_path / "in" / "a.png", 0)
    write_image(tmp_path / "in" / name, 1)
    for string in ("Folder", "ImageFolder"):
        length, warnings = length_and_warnings(f"{string}:root={tmp_path}", caplog)
        assert length == 1 and len(warnings) == 1
        assert re.search(rf"skipped: {words}\. Rename, convert or unpack", warnings[0])
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(DataError, match=f"holds no images .*; skipped: {words}"):
        build_dataset(f"Folder:root={tmp_path}")


def test_all_kinds_are_in_one_warning(tmp_path, caplog):
    for name in ("1.png", "2.zip", "3.psd", "4.psd", ".5.png"):
        write_image(tmp_path / name, 0)
    length, (warning,) = length_and_warnings(f"Folder:root={tmp_path}", caplog)
    assert length == 1
    for words in ("archives (1, such as 2.zip)", "not read here (2, such as 3.psd)", "hidden image files (1, "):
        assert words in warning


def test_images_without_an_extension_are_found_among_other_files(tmp_path, caplog):
    write_image(tmp_path / "1.png", 0)
    for name in ("LICENSE", "Makefile", "README"):
        (tmp_path / name).write_text("no image")
    for number in range(20):
        write_image(tmp_path / f"n01_{number}", 1)
    _, (warning,) = length_and_warnings(f"Folder:root={tmp_path}", caplog)
    assert "images without a usual ending (23, such as n01_0)" in warning


def test_images_beside_the_class_folders(tmp_path, caplog):
    write_image(tmp_path / "ant" / "1.png", 0)
    write_image(tmp_path / "2.png", 1)
    write_image(tmp_path / "3.png", 1)
    length, (warning,) = length_and_warnings(f"ImageFolder:root={tmp_path}", caplog)
    assert length == 1 and "images beside the class folders (2, such as 2.png)" in warning
    (tmp_path / "ant" / "1.png").unlink()
    (tmp_path / "ant").rmdir()
    message = r"has no class folders; it holds images \(2, such as 2\.png\); for unlabelled images write Folder:root="
    with pytest.raises(DataError, match=message):
        build_dataset(f"ImageFolder:root={tmp_path}")


def test_links(tmp_path, caplog):
    write_image(tmp_path / "elsewhere" / "1.png", 2)
    root = tmp_path / "root"
    root.mkdir()
    (root / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "2.png").symlink_to(tmp_path / "nowhere.png")
    (root / "3.png").symlink_to(root / "3.png")
    os.mkfifo(root / "4.png")
    (root / "5.zip").symlink_to(tmp_path / "nowhere.zip")
    os.mkfifo(root / "pipe")
    (root / "note.txt").symlink_to(tmp_path / "nowhere.txt")
    length, (warning,) = length_and_warnings(f"Folder:root={root}", caplog)
    assert length == 1 and "broken links and special files (4, such as 2.png)" in warning


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write_image(tmp_path / "in" / "1.png", 0)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for string in ("Folder", "ImageFolder"):
        with pytest.raises(DataError, match=r"cannot read the folder .*in: Permission denied"):
            build_dataset(f"{string}:root={tmp_path}")


def test_names_that_are_not_utf8(tmp_path):
    for name in (b"caf\xe9.png", b".caf\xe9.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encoded(1))
    left_out = LeftOut(tmp_path.joinpath)
    assert list_images(tmp_path, left_out) == ["caf\udce9.png"]
    assert left_out.by_kind() == {"hidden image files": (1, ".caf\udce9.png")}
    os.remove(os.path.join(os.fsencode(tmp_path), b".caf\xe9.png"))  # pytest-xdist cannot pass on a log with its name
    assert colour(build_dataset(f"Folder:root={tmp_path}"), 0) == COLOURS[1]
