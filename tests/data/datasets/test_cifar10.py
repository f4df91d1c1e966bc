import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_eq.data.datasets import DataError, build_dataset
from tests.data.datasets.images import COLOURS, colour, encoded


def test_cifar10_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in [f"data_batch_{number}" for number in range(1, 6)]:
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, 9]}))
    with pytest.raises(DataError, match="holds neither"):
        build_dataset(f"CIFAR10:root={tmp_path}")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [1, 2]}))
    train = build_dataset(f"CIFAR10:root={tmp_path}")
    assert len(train) == 10
    assert train.labels.tolist() == [3, 9] * 5
    assert (np.asarray(train.read(3)) == pixels[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    test = build_dataset(f"CIFAR10:split=TEST:root={folder}")
    assert [test.class_names[label] for label in test.labels] == ["automobile", "bird"]
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="lacks data_batch_4"):
        build_dataset(f"CIFAR10:root={tmp_path}")


def test_cifar10_parquet(tmp_path):
    columns = {"image": [encoded(0), encoded(1)], "label": [5, 0]}
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    dataset = build_dataset(f"CIFAR10:split=TEST:root={tmp_path}")
    assert dataset.labels.tolist() == [5, 0]
    assert colour(dataset, 1) == COLOURS[1]
    assert dataset.class_names[5] == "dog"


def test_decoding_keys_are_for_encoded_images(tmp_path):
    pq.write_table(pa.table({"image": [encoded(0)], "label": [5]}), tmp_path / "test.parquet")
    dataset = build_dataset(f"CIFAR10:split=TEST:root={tmp_path}:exif=true")
    assert dataset.decoding.exif
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}))
    with pytest.raises(DataError, match=r"exif=\.\.\. applies to image files only, and this dataset has none"):
        build_dataset(f"CIFAR10:split=TEST:root={tmp_path}:exif=true")


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
        {b"data": np.zeros((1, 3072), np.float32), b"labels": [1]},
        [1, 2],
        Path("anything"),
    ],
)
def test_pickles_of_something_else(tmp_path, batch):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=r"test_batch is damaged: .*Unpack cifar-10-python\.tar\.gz again"):
        build_dataset(f"CIFAR10:split=TEST:root={tmp_path}")
