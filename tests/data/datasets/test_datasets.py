"""Data strings, generated pictures, and what holds for every dataset."""

import pickle

import numpy as np
import pytest

from dinov2_eq.data.datasets import DATASETS, DataError, build_dataset, require_labels
from dinov2_eq.data.datasets.data_string import parse_data_string
from tests.data.datasets.images import write_image


def test_values_with_colons_and_equal_signs_are_quoted():
    expected = ("Folder", {"root": "s3://a=b", "note": 'it"s'})
    assert parse_data_string("""Folder:root='s3://a=b':note='it"s'""") == expected
    assert parse_data_string('Parquet:path="/a:b/*.parquet":label=x') == (
        "Parquet",
        {"path": "/a:b/*.parquet", "label": "x"},
    )


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("ImageFoldr:root=x", "unknown dataset 'ImageFoldr'.*Did you mean 'ImageFolder'"),
        ("Folder:rot=x", "Folder has no key 'rot'.*Did you mean 'root'"),
        ("Folder", "Folder needs root="),
        ("Folder:root=", "Folder needs root="),
        ("Parquet", "Parquet needs path="),
        ("Folder:root=/a:/b", "cannot read '/b'.*quote"),
        ("Folder:root=a:root=b", "given twice"),
        ("Folder:root=/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("ImageNet:root=/nowhere", "there is no folder"),
        ("Parquet:path=/nowhere/*.parquet", "no Parquet file"),
        ("Shapes:split=train", "split='train' is unknown.*Did you mean 'TRAIN'"),
        ("Shapes:size=big", "size='big' is not a whole number"),
        ("Shapes:num=0", "num=0 is too small"),
    ],
)
def test_errors_name_the_fault_and_the_remedy(string, message):
    with pytest.raises(DataError, match=message):
        build_dataset(string)


def test_every_dataset_is_named_in_the_error_of_an_unknown_one():
    with pytest.raises(DataError) as error:
        build_dataset("Nothing")
    assert all(name in str(error.value) for name in DATASETS)


# Shapes


def test_shapes_depend_on_seed_split_and_index_only():
    pictures = {
        string: np.asarray(build_dataset(string).read(3))
        for string in ("Shapes", "Shapes:num=4:split=TRAIN", "Shapes:split=VAL", "Shapes:seed=1")
    }
    first, same, val, other = pictures.values()
    assert first.shape == (64, 64, 3)
    assert (first == same).all()
    assert not (first == val).all() and not (first == other).all()


def test_shapes_are_labelled_and_of_any_size():
    dataset = build_dataset("Shapes:size=33:num=30")
    assert np.bincount(require_labels(dataset, "k-NN")).tolist() == [3] * len(dataset.class_names)
    assert dataset.read(29).size == (33, 33)
    assert build_dataset("Shapes:size=1").read(0).size == (1, 1)
    pixels = np.stack([np.asarray(dataset.read(index), dtype=float) for index in range(30)])
    assert pixels[:, :8].mean() > pixels[:, -8:].mean() + 20  # lit from above


@pytest.mark.parametrize("string", ["Shapes:num=3", "Folder:root={}", "ImageFolder:root={}"])
def test_datasets_are_picklable(tmp_path, string):
    write_image(tmp_path / "class" / "1.png", 1)
    dataset = build_dataset(string.format(tmp_path))
    assert (np.asarray(pickle.loads(pickle.dumps(dataset)).read(0)) == np.asarray(dataset.read(0))).all()
