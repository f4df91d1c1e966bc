import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_eq.data.corrupt import read_or_next
from dinov2_eq.data.datasets import DataError, UnreadableImage, build_dataset, require_labels
from dinov2_eq.data.datasets import parquet as parquet_module
from tests.data.datasets.images import COLOURS, colour, encoded


def write_parquet(tmp_path, name, columns, row_group_size=2):
    (tmp_path / "packs").mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), tmp_path / "packs" / name, row_group_size=row_group_size)
    return tmp_path / "packs" / name


def test_parquet_folder_glob_and_row_groups(tmp_path, monkeypatch):
    images = [encoded(number) for number in range(6)]
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
    images = [{"bytes": encoded(number), "path": None} for number in range(3)]
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
        (":label=kind:image=number", "no column 'kind'"),
        (":image=number", "column 'number' is of type int64, not encoded images"),
        (":label=image", "labels are whole numbers or strings"),
    ],
)
def test_parquet_wrong_columns(tmp_path, options, message):
    path = write_parquet(tmp_path, "a.parquet", {"image": [b"x"], "label": [-1], "number": [3]})
    with pytest.raises(DataError, match=message):
        require_labels(build_dataset(f"Parquet:path={path}{options}"), "k-NN")


def test_parquet_unusable_files_and_labels(tmp_path):
    path = write_parquet(tmp_path, "a.parquet", {"image": [b"x", b"y"], "label": [-1, 0]})
    with pytest.raises(DataError, match=r"1 of 2 labels .* negative"):
        require_labels(build_dataset(f"Parquet:path={path}"), "k-NN")
    path = write_parquet(tmp_path, "c.parquet", {"image": pa.array([], type=pa.binary())})
    with pytest.raises(DataError, match="has no rows"):
        build_dataset(f"Parquet:path={path}")
    path.write_bytes(b"no Parquet at all")
    with pytest.raises(DataError, match="is not a Parquet file"):
        build_dataset(f"Parquet:path={path}")


def test_a_column_that_is_named_and_missing_is_an_error_at_once(tmp_path):
    path = write_parquet(tmp_path, "a.parquet", {"image": [b"x"], "label": [0]})
    with pytest.raises(DataError, match="no column 'kind'"):
        build_dataset(f"Parquet:path={path}:label=kind")
    twice = pa.table([pa.array([b"x"]), pa.array([1]), pa.array([2])], names=["image", "label", "label"])
    pq.write_table(twice, path)
    with pytest.raises(DataError, match="two columns 'label'"):
        build_dataset(f"Parquet:path={path}:label=label")


# labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 2], [1]], r"a\.parquet: column 'label' is of type list<.*>; labels are whole numbers or strings"),
        ([0.5, 1.5], "is of type double; labels are"),
        ([True, False], "is of type bool; labels are"),
        (pa.nulls(2, pa.int64()), "2 empty labels; remove these rows"),
        (pa.nulls(2), "2 empty labels; remove these rows"),
        ([None, "ant"], "1 empty labels; remove these rows"),
        (pa.array([1, 2**63], pa.uint64()), "the labels in column 'label' cannot be read: .*not in range"),
    ],
)
def test_training_needs_no_usable_labels(tmp_path, labels, message):
    path = write_parquet(tmp_path, "a.parquet", {"image": [encoded(0), encoded(1)], "label": labels})
    dataset = build_dataset(f"Parquet:path={path}")
    assert [colour(dataset, index) for index in range(2)] == COLOURS[:2]
    assert colour(pickle.loads(pickle.dumps(dataset)), 1) == COLOURS[1]
    with pytest.raises(
        DataError, match=rf"k-NN needs labels, and those of 'Parquet:path=.*' cannot be used: .*{message}"
    ):
        require_labels(dataset, "k-NN")


@pytest.mark.parametrize(
    ("first", "second", "names", "expected"),
    [
        (pa.array([3, 1]), pa.array([2, 0], pa.int32()), None, [3, 1, 2, 0]),
        (pa.array([3, 1], pa.uint8()), pa.array([-1, 0], pa.int16()), None, [3, 1, -1, 0]),
        (pa.array([3, 1]).dictionary_encode(), pa.array([2, 0]), None, [3, 1, 2, 0]),
        (pa.array(["b", "d"]), pa.array(["c", "a"]).dictionary_encode(), ["a", "b", "c", "d"], [1, 3, 2, 0]),
        (pa.array(["b", "d"], pa.large_string()), pa.array(["d", "a"]), ["a", "b", "d"], [1, 2, 2, 0]),
        (pa.array(["b", "d"], pa.string_view()), pa.array(["d", "a"]), ["a", "b", "d"], [1, 2, 2, 0]),
    ],
)
def test_files_may_store_labels_differently(tmp_path, first, second, names, expected):
    images = [encoded(0), encoded(1)]
    write_parquet(tmp_path, "a.parquet", {"image": images, "label": first})
    write_parquet(tmp_path, "b.parquet", {"image": images, "label": second})
    write_parquet(tmp_path, "c.parquet", {"image": pa.array([], pa.binary()), "label": pa.nulls(0)})  # no rows, no type
    dataset = build_dataset(f"Parquet:path={tmp_path / 'packs'}")
    assert dataset.labels.tolist() == expected and dataset.labels.dtype == np.int64
    assert dataset.class_names == names
    assert pickle.loads(pickle.dumps(dataset)).labels.tolist() == expected


def test_files_whose_labels_do_not_go_together(tmp_path):
    write_parquet(tmp_path, "a.parquet", {"image": [encoded(0)], "label": [3]})
    write_parquet(tmp_path, "b.parquet", {"image": [encoded(1)], "label": ["ant"]})
    string = f"Parquet:path={tmp_path / 'packs'}"
    with pytest.raises(DataError, match=r"type int64 in .*a\.parquet and of type string in .*b\.parquet"):
        require_labels(build_dataset(string), "k-NN")
    write_parquet(tmp_path, "b.parquet", {"image": [encoded(1)]})
    dataset = build_dataset(string)
    assert colour(dataset, 1) == COLOURS[1]
    with pytest.raises(DataError, match=r"1 of 2 files have no column 'label', for example .*b\.parquet"):
        require_labels(dataset, "k-NN")


def test_files_may_store_images_differently(tmp_path):
    columns = [
        pa.array([encoded(0)]),
        pa.array([encoded(1)], pa.large_binary()),
        pa.array([{"bytes": encoded(2), "path": "2.png"}]),
        pa.array([encoded(3)], pa.binary_view()),
    ]
    for name, column in zip("abcd", columns, strict=True):
        write_parquet(tmp_path, f"{name}.parquet", {"image": column})
    dataset = build_dataset(f"Parquet:path={tmp_path / 'packs'}")
    assert [colour(dataset, index) for index in range(4)] == COLOURS[:4]


# files


def test_other_files_in_the_folder_are_named(tmp_path, caplog):
    path = write_parquet(tmp_path, "a.parquet", {"image": [encoded(0)]})
    for name in ("b.parq", "c.pq", "d.PARQUET", ".e.parquet", "f.parquet.incomplete", ".a.parquet.crc", "_SUCCESS"):
        (path.parent / name).write_bytes(path.read_bytes())
    (path.parent / "g.png").write_bytes(encoded(1))
    assert len(build_dataset(f"Parquet:path={path.parent}")) == 1
    (warning,) = caplog.messages
    assert "Parquet files that are hidden or do not end in .parquet (5, such as .e.parquet)" in warning
    assert "not read here (1, such as g.png)" in warning
    assert len(build_dataset(f"Parquet:path={path.parent}/*.pq")) == 1
    path.unlink()
    with pytest.raises(DataError, match=r"no Parquet file at .*; skipped: Parquet files .* \(5, "):
        build_dataset(f"Parquet:path={path.parent}")


def test_broken_links_and_special_files(tmp_path, caplog):
    path = write_parquet(tmp_path, "a.parquet", {"image": [encoded(0)]})
    os.mkfifo(path.parent / "b.parquet")
    os.mkfifo(path.parent / "pipe")
    for where in (path.parent, path.parent / "*.parquet"):
        with pytest.raises(DataError, match=r"b\.parquet is a broken link or not a regular file; restore or remove it"):
            build_dataset(f"Parquet:path={where}")
    (path.parent / "b.parquet").rename(path.parent / "b.pq")
    assert len(build_dataset(f"Parquet:path={path.parent}")) == 1
    assert "broken links and special files (1, such as b.pq)" in caplog.text
    (path.parent / "c.parquet").symlink_to(tmp_path / "nowhere.parquet")
    with pytest.raises(DataError, match=r"c\.parquet is a broken link"):
        build_dataset(f"Parquet:path={path.parent}")


def test_a_folder_that_is_named_like_a_file(tmp_path):
    path = write_parquet(tmp_path, "part.parquet", {"image": [encoded(4)]})
    (tmp_path / "table.parquet").mkdir()
    path.rename(tmp_path / "table.parquet" / "part.parquet")
    assert colour(build_dataset(f"Parquet:path={tmp_path}"), 0) == COLOURS[4]


def test_names_that_are_not_utf8(tmp_path):
    path = write_parquet(tmp_path, "a.parquet", {"image": [encoded(4)], "label": [3]})
    os.rename(path, os.path.join(os.fsencode(path.parent), b"caf\xe9.parquet"))
    dataset = build_dataset(f"Parquet:path={path.parent}")
    assert colour(dataset, 0) == COLOURS[4] and dataset.labels.tolist() == [3]


def test_a_damaged_row_group_is_passed_over(tmp_path):
    path = write_parquet(tmp_path, "a.parquet", {"image": [encoded(number) for number in range(6)]})
    group = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    path.write_bytes(content)
    dataset = build_dataset(f"Parquet:path={path}")
    with pytest.raises(UnreadableImage, match=rf"^{path}, row group 1: \w+: ") as caught:
        dataset.read(2)
    assert caught.value.rest == 1
    image, skipped = read_or_next(dataset, 2, dataset.read)
    assert image.getpixel((0, 0)) == COLOURS[4] and len(skipped) == 1
