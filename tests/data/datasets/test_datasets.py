"""Every data string, on files made here, and every way in which one can be wrong."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from dinov2_eq.data.datasets import DATASETS, DataError, build_dataset, require_labels
from dinov2_eq.data.datasets import parquet as parquet_module
from dinov2_eq.data.datasets.data_string import parse_data_string

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (9, 9, 9)]


def write_image(path, number, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[number]).save(path, format="PNG")


def colour(dataset, index):
    return dataset.read(index).getpixel((0, 0))


def encoded(tmp_path, number):
    write_image(tmp_path / "scratch" / "one.png", number)
    return (tmp_path / "scratch" / "one.png").read_bytes()


def write_parquet(tmp_path, name, columns, row_group_size=2):
    (tmp_path / "packs").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "packs" / name, row_group_size=row_group_size)
    return tmp_path / "packs" / name


# data strings


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


# folders


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
    with pytest.raises(DataError, match=r"has 2 lines.*holds 3 images"):
        build_dataset(string)


# CIFAR-10


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
    columns = {"image": [encoded(tmp_path, 0), encoded(tmp_path, 1)], "label": [5, 0]}
    write_parquet(tmp_path, "test.parquet", columns)
    dataset = build_dataset(f"CIFAR10:split=TEST:root={tmp_path / 'packs'}")
    assert dataset.labels.tolist() == [5, 0]
    assert colour(dataset, 1) == COLOURS[1]


# Parquet


def test_parquet_folder_glob_and_row_groups(tmp_path, monkeypatch):
    images = [encoded(tmp_path, number) for number in range(6)]
    write_parquet(tmp_path, "a.parquet", {"image": images[:5], "label": [4, 3, 2, 1, 0]})
    write_parquet(tmp_path, "b.parquet", {"image": images[5:], "label": [7]})
    for path in (tmp_path / "packs", tmp_path / "packs" / "*.parquet"):
        dataset = build_dataset(f"Parquet:path={path}")
        assert dataset.labels.tolist() == [4, 3, 2, 1, 0, 7]
        assert [colour(dataset, index) for index in (5, 0, 4, 2, 3, 1)] == [COLOURS[i] for i in (5, 0, 4, 2, 3, 1)]
    assert dataset.name(4).endswith("a.parquet, row group 2, row 0")

    assert len(dataset._cache) == 4
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 1)
    assert [colour(dataset, index) for index in (0, 5, 3)] == [COLOURS[i] for i in (0, 5, 3)]
    assert colour(pickle.loads(pickle.dumps(dataset)), 3) == COLOURS[3]
    assert len(pickle.loads(pickle.dumps(dataset))._cache) == 0


def test_parquet_struct_and_string_labels(tmp_path):
    images = [{"bytes": encoded(tmp_path, number), "path": None} for number in range(3)]
    path = write_parquet(tmp_path, "hf.parquet", {"picture": images, "kind": ["owl", "ant", "owl"]})
    dataset = build_dataset(f"Parquet:path={path}:image=picture:label=kind")
    assert dataset.class_names == ["ant", "owl"]
    assert dataset.labels.tolist() == [1, 0, 1]
    assert colour(dataset, 1) == COLOURS[1]
    unlabelled = build_dataset(f"Parquet:path={path}:image=picture")
    with pytest.raises(DataError, match="label="):
        require_labels(unlabelled, "the linear probe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (":label=kind", "no column 'kind'; its columns are image, label, number. Choose one by label="),
        (":image=picture", "no column 'picture'; its columns are"),
        (":image=number", "column 'number' is of type int64, not encoded images"),
        (":label=image", "labels are whole numbers or strings"),
    ],
)
def test_parquet_wrong_columns(tmp_path, options, message):
    path = write_parquet(tmp_path, "a.parquet", {"image": [b"x"], "label": [-1], "number": [3]})
    with pytest.raises(DataError, match=message):
        build_dataset(f"Parquet:path={path}{options}")


def test_parquet_unusable_files_and_labels(tmp_path):
    path = write_parquet(tmp_path, "a.parquet", {"image": [b"x", b"y"], "label": [-1, 0]})
    with pytest.raises(DataError, match=r"1 of 2 labels .* negative"):
        require_labels(build_dataset(f"Parquet:path={path}"), "k-NN")
    path = write_parquet(tmp_path, "b.parquet", {"image": [b"x", b"y"], "label": [None, 0]})
    with pytest.raises(DataError, match="1 empty labels"):
        build_dataset(f"Parquet:path={path}")
    path = write_parquet(tmp_path, "c.parquet", {"image": pa.array([], type=pa.binary())})
    with pytest.raises(DataError, match="has no rows"):
        build_dataset(f"Parquet:path={path}")
    path.write_bytes(b"no Parquet at all")
    with pytest.raises(DataError, match="is not a Parquet file"):
        build_dataset(f"Parquet:path={path}")


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
