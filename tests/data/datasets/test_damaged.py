"""Truncated files and files with flipped bits give an error of one sentence that names the file."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from dinov2_eq.data.class_mapping import read_class_mapping
from dinov2_eq.data.datasets import DataError, UnreadableImage, build_dataset
from tests.data.datasets.images import encoded, write_image
from tests.data.datasets.tars import write_tar

NUM_CUTS, NUM_FLIPS = 12, 60


def damaged(content, num_cuts=NUM_CUTS, num_flips=NUM_FLIPS):
    """The content cut at several lengths, and with a few bits flipped anywhere or within 64 bytes of an end."""
    for number in range(num_cuts):
        yield content[: len(content) * number // num_cuts]
    generator = np.random.default_rng(0)
    for number in range(num_flips):
        flipped = bytearray(content)
        ranges = [(0, len(content)), (0, min(64, len(content))), (max(0, len(content) - 64), len(content))]
        for place in generator.integers(*ranges[number % 3], size=3):
            flipped[place] ^= 1 << int(generator.integers(8))
        yield bytes(flipped)


def read_all(data_string):
    """Uses everything that a dataset offers; unreadable images come last."""
    dataset = build_dataset(data_string)
    error = None
    for index in range(len(dataset)):
        try:
            dataset.read(index)
        except UnreadableImage as unreadable:
            error = unreadable
    assert dataset.labels is None or len(dataset.labels) == len(dataset)
    if error:
        raise error


def count_refusals(path, read, errors, **numbers):
    """Counts the damaged contents that are refused; other errors propagate, and all must name the file."""
    content, num_refused = path.read_bytes(), 0
    read()
    for bad in damaged(content, **numbers):
        path.write_bytes(bad)
        try:
            read()
        except errors as error:
            assert path.name in str(error)
            num_refused += 1
    return num_refused


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_parquet(tmp_path, compression):
    path = tmp_path / "a.parquet"
    images = [{"bytes": encoded(number), "path": "x.png"} for number in range(6)]
    pq.write_table(
        pa.table({"image": images, "label": list("abcabc")}), path, row_group_size=2, compression=compression
    )
    assert count_refusals(path, lambda: read_all(f"Parquet:path={path}"), (DataError, UnreadableImage)) > NUM_CUTS


def test_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "1.cls": b"5", f"{'long' * 40}.png": encoded(2)})
    refused = count_refusals(path, lambda: read_all(f"WebDataset:urls={path}"), (DataError, UnreadableImage))
    assert refused > NUM_CUTS // 2  # half of so small a tar file are the zeros at its end


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_batches(tmp_path, protocol):
    path = tmp_path / "test_batch"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 9]}, protocol=protocol))
    assert count_refusals(path, lambda: read_all(f"CIFAR10:split=TEST:root={tmp_path}"), DataError) >= NUM_CUTS


@pytest.mark.parametrize("name", ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"])
def test_development_kit(tmp_path, name):
    write_image(tmp_path / "train" / "n01" / "1.png", 0)
    for number in range(2):
        write_image(tmp_path / "val" / f"{number}.png", number)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array([(1, "n03", 0), (2, "n01", 0)], dtype=fields)})
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    numbers = {"num_cuts": 2, "num_flips": 4}  # a process for each

    def read():
        read_all(f"ImageNet:split=VAL:root={tmp_path}")

    assert count_refusals(tmp_path / name, read, DataError, **numbers) >= 2


def test_a_list_of_classes_that_crashes_its_reader(tmp_path):
    write_image(tmp_path / "val" / "1.png", 0)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    synsets = [(1, "n03", "c", 0), (2, "n01", "a", 0), (3, "n02", "b", 0), (4, "n00", "all", 3)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(synsets, dtype=fields)})
    content = bytearray((tmp_path / "meta.mat").read_bytes())
    content[content.index(b"n01\0") - 8] = 8  # the length of the name of that array, which has none
    (tmp_path / "meta.mat").write_bytes(content)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"meta\.mat is not the list of classes .*: its reader ended with code -\d+$"):
        _ = build_dataset(f"ImageNet:split=VAL:root={tmp_path}").labels


def test_class_mappings(tmp_path):
    path = tmp_path / "mapping.npy"
    np.save(path, np.arange(20))
    assert count_refusals(path, lambda: read_class_mapping(path), ValueError) >= NUM_CUTS
