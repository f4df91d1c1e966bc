import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.data.datasets import DataError, build_dataset
from dinov2_eq.data.labelled import (
    LabelledImages,
    draw_per_class,
    draw_subset,
    read_labelled,
    split_held_out,
)

SHAPES = "Shapes:split=TRAIN:num=40:size=8"


def folders(root, **counts):
    """A data string for class folders with the given numbers of images."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")
    return f"ImageFolder:root={root}"


def labelled(labels):
    return LabelledImages(None, 100 + np.arange(len(labels)), torch.tensor(labels))


def test_reads_all_and_closes_gaps_in_the_labels(tmp_path):
    # The middle class is empty in both; its number is not used.
    counts = {"a": 3, "b": 0, "c": 2}
    train, val = folders(tmp_path / "train", **counts), folders(tmp_path / "val", **{**counts, "a": 1})
    assert build_dataset(train).labels.tolist() == [0, 0, 0, 2, 2]
    first, second = read_labelled(train, [val], "k-NN")
    assert first.labels.tolist() == [0, 0, 0, 1, 1] and second.labels.tolist() == [0, 1, 1]
    assert first.indices.tolist() == [0, 1, 2, 3, 4] and second.dataset.data_string == val


def test_max_images():
    (images,) = read_labelled(SHAPES, [], "k-NN", max_images=35)
    assert len(images.indices) == len(images.labels) == 35
    assert images.labels.tolist() == [build_dataset(SHAPES).labels[index] for index in images.indices]


def test_unlabelled(tmp_path):
    folders(tmp_path, a=1)
    with pytest.raises(DataError, match="Linear classification needs labels"):
        read_labelled(f"Folder:root={tmp_path}", [SHAPES], "Linear classification")
    with pytest.raises(DataError, match="k-NN needs labels"):
        read_labelled(SHAPES, [f"Folder:root={tmp_path}"], "k-NN")


def test_a_single_class(tmp_path):
    with pytest.raises(DataError, match=r"at least two classes, but all 3 images of .* have label 0"):
        read_labelled(folders(tmp_path, a=3), [], "k-NN")
    with pytest.raises(DataError, match="or raise --max-images"):
        read_labelled(SHAPES, [], "k-NN", max_images=1)


def test_classes_that_training_lacks():
    with pytest.raises(
        DataError, match=r"2 of the 10 classes of 'Shapes:num=10:size=8' have no image .* \(labels 8, 9\)"
    ):
        read_labelled("Shapes:num=8:size=8", ["Shapes:num=10:size=8"], "k-NN")


def test_classes_that_the_chosen_images_lack():
    val = "Shapes:split=VAL:num=10:size=8"
    with pytest.raises(DataError, match=r"have no image in .*, or raise --max-images \(it is 12\)"):
        read_labelled(SHAPES, [val], "k-NN", 12)
    train, others = read_labelled(SHAPES, [val], "k-NN", 12, classes_without_images=True)
    assert len(train.labels.unique()) < 10 and others.labels.tolist() == list(range(10))
    with pytest.raises(DataError, match=r"2 of the 10 classes .* \(labels 8, 9\).* the same classes\.$"):
        read_labelled("Shapes:num=8:size=8", [val], "k-NN", 12, classes_without_images=True)


def test_labels_that_mean_something_else(tmp_path):
    train, val = folders(tmp_path / "train", a=1, b=1, c=1), folders(tmp_path / "val", a=1, c=1)
    with pytest.raises(DataError, match=r"Label 1 is 'b' in .* and 'c' in"):
        read_labelled(train, [val], "k-NN")
    read_labelled(val, [val], "k-NN")


def test_images_of_each_class():
    labels = torch.arange(40) % 4
    chosen = draw_per_class(labels, 3, 0, "--n-per-class")
    assert labels[chosen].bincount().tolist() == [3] * 4 and chosen.tolist() == sorted(chosen.tolist())
    assert torch.equal(chosen, draw_per_class(labels, 3, 0, "--n-per-class"))
    assert not torch.equal(chosen, draw_per_class(labels, 3, 1, "--n-per-class"))
    # Fewer are a part of more, so that numbers of images can be compared.
    assert set(chosen.tolist()) < set(draw_per_class(labels, 5, 0, "--n-per-class").tolist())


def test_fewer_images_of_a_class_than_asked_for():
    with pytest.raises(ValueError, match=r"--n-per-class 3 is more than 1 of the 2 classes have: class 1 has 2"):
        draw_per_class(torch.tensor([0, 0, 0, 1, 1]), 3, 0, "--n-per-class")
    with pytest.raises(ValueError, match="--n-per-class 0: give a number of images of at least 1"):
        draw_per_class(torch.tensor([0, 1]), 0, 0, "--n-per-class")


def test_a_subset_keeps_labels_with_their_images():
    images = labelled([0, 1, 2] * 5)
    subset = draw_subset(images, 2, 0)
    assert subset.labels.tolist() == [(index - 100) % 3 for index in subset.indices] and len(subset.labels) == 6
    assert draw_subset(images, -1, 0) is images


def test_the_held_out_part_is_stratified_and_disjoint():
    images = labelled([0] * 50 + [1] * 20 + [2] * 4 + [3])
    kept, held_out = split_held_out(images, 0.1, 0)
    assert held_out.labels.bincount().tolist() == [5, 2, 1] and kept.labels.bincount().tolist() == [45, 18, 3, 1]
    assert sorted([*kept.indices, *held_out.indices]) == images.indices.tolist()
    again, other = (split_held_out(images, 0.1, seed)[1].indices.tolist() for seed in (0, 1))
    assert again == held_out.indices.tolist() != other
    assert split_held_out(images, 0.99, 0)[0].labels.bincount().tolist() == [1, 1, 1, 1]


def test_nothing_to_hold_out():
    with pytest.raises(ValueError, match=r"a single training image.*--select-on-val"):
        split_held_out(labelled([0, 1, 2]), 0.1, 0)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.0"):
        split_held_out(labelled([0, 0, 1]), 1.0, 0)


def mapping_file(path, values):
    np.save(path, np.array(values))
    return path


def test_labels_by_a_class_mapping(tmp_path, caplog):
    # Training labels 0, 2 and 4 are used, and close up to 0, 1 and 2.
    train = folders(tmp_path / "train", a=2, b=0, c=2, d=0, e=1)
    test = folders(tmp_path / "test", a=1, e=3)
    mapping = mapping_file(tmp_path / "mapping.npy", [0, 4])
    first, second, third = read_labelled(train, [test, train], "test", class_mappings=[mapping, None])
    assert second.labels.tolist() == [0, 1, 1, 1] and second.classes.tolist() == [0, 2]
    assert first.labels.tolist() == third.labels.tolist() == [0, 0, 1, 1, 2] and third.classes is None
    assert not caplog.messages
    read_labelled(train, [test], "test", class_mappings=[mapping_file(mapping, [4, 0])])
    assert "2 of its classes have other names than the training classes" in caplog.text and "'a' is 'e'" in caplog.text


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([0], r"has label 2, but class mapping .*mapping.npy only has entries for 0 to 0"),
        ([0, 1, 2], r"Class mapping .*mapping.npy contains label 1, but .*train' has no image"),
        ([0, 2, 9], r"contains label 9, but"),
    ],
)
def test_class_mappings_that_do_not_fit(tmp_path, mapping, message):
    train, test = folders(tmp_path / "train", a=2, b=0, c=2), folders(tmp_path / "test", a=1, b=0, c=1)
    with pytest.raises(DataError, match=message):
        read_labelled(train, [test], "test", class_mappings=[mapping_file(tmp_path / "mapping.npy", mapping)])
