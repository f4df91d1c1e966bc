import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dinov2_eq.data.corrupt import read_or_next
from dinov2_eq.data.datasets import DataError, UnreadableImage, build_dataset, pair_components
from dinov2_eq.data.datasets.threediebench import HUES, multiply, quaternion, relative_theta
from tests.helpers import TINY, in_this_process
from tests.rendered import colour, random_latents, write_objects

OBJECTS = {"train": ["0001/a", "0002/b", "0001/c"], "val": ["0002/d"]}
LABELS = {"train": [0, 1, 0], "val": [1]}
VIEWS = 4


@pytest.fixture
def root(tmp_path):
    write_objects(tmp_path, OBJECTS, LABELS, VIEWS)
    return tmp_path


def build(root, *keys, split="TRAIN"):
    return build_dataset(":".join(["3DIEBench", f"split={split}", f"root={root}", *keys]))


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def test_images_come_object_by_object(root):
    dataset = build(root)
    assert len(dataset) == 3 * VIEWS and dataset.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert dataset.name(6) == str(root / "0002/b/image_2.jpg")
    np.testing.assert_array_equal(dataset.latents(6), np.load(root / "0002/b/latent_2.npy"))
    assert dataset.read(6).size == (40, 40)
    np.testing.assert_allclose(dataset.read(6).getpixel((20, 5)), colour(dataset.latents(6)[3]), atol=8)
    val = build(root, split="VAL")
    assert val.name(0) == str(root / "0002/d/image_0.jpg") and val.labels.tolist() == [1] * 4


def test_fewer_views(root):
    dataset = build(root, "views=2")
    assert [dataset.name(index)[-12:] for index in range(4)] == ["/image_0.jpg", "/image_1.jpg"] * 2
    for seed in range(5):
        assert dataset.another_view(3, generator_of(seed)) == 2


def test_the_second_image_is_any_other_view_of_the_object(root):
    dataset, generator = build(root), generator_of(0)
    drawn = [dataset.another_view(5, generator) for _ in range(300)]
    assert set(drawn) == {4, 6, 7} and min(map(drawn.count, (4, 6, 7))) > 70


def test_a_pair(root):
    dataset = build(root)
    pair, again = (dataset.read_pair(9, generator_of(1)) for _ in range(2))
    second = dataset.another_view(9, generator_of(1))
    assert pair.first == dataset.read(9) and pair.second == dataset.read(second) == again.second
    assert pair.theta.dtype == torch.float32 and len(pair.theta) == len(dataset.components) == 6
    expected = relative_theta(dataset.latents(9), dataset.latents(second))
    np.testing.assert_allclose(pair.theta.numpy(), expected, atol=1e-7)
    assert pair_components(dataset.data_string) == dataset.components


def test_theta_is_scipys():
    first, second = (random_latents(np.random.default_rng(seed), 1000) for seed in (1, 2))
    rotations = [Rotation.from_euler("xyz", latents[:, :3]) for latents in (first, second)]  # small letters: fixed axes
    expected = (rotations[0].inv() * rotations[1]).as_quat()
    found = relative_theta(first, second)
    # The two signs of a quaternion are one rotation.
    signs = np.sign((expected * found[:, :4]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found[:, :4] * signs, expected, atol=1e-12)
    np.testing.assert_allclose(found[:, 4], second[:, 3] - first[:, 3])
    np.testing.assert_allclose(found[:, 5], second[:, 6] - first[:, 6])
    assert np.abs(np.linalg.norm(found[:, :4], axis=1) - 1).max() < 1e-12


def test_the_distribution_of_theta_is_that_of_3diebench():
    """Known of 200,000 simulated pairs: means, variances, and how often w is negative."""
    first, second = (random_latents(np.random.default_rng(seed), 50000) for seed in (1, 2))
    theta = relative_theta(first, second)
    np.testing.assert_allclose(theta.mean(axis=0), [0, 0, 0, 0.533, 0, 0], atol=0.01)
    np.testing.assert_allclose(theta.var(axis=0), [0.209, 0.209, 0.208, 0.090, 1 / 6, 1 / 6], atol=0.004)
    assert (theta[:, 3] < 0).mean() == pytest.approx(0.044, abs=0.004)


def test_theta_leads_from_the_first_view_to_the_second():
    first, middle, last = (random_latents(np.random.default_rng(seed), 20) for seed in range(3))
    steps = multiply(relative_theta(first, middle)[:, :4], relative_theta(middle, last)[:, :4])
    np.testing.assert_allclose(steps, relative_theta(first, last)[:, :4], atol=1e-12)
    turned = multiply(quaternion(first[:, :3]), relative_theta(first, last)[:, :4])
    np.testing.assert_allclose(turned, quaternion(last[:, :3]), atol=1e-12)
    np.testing.assert_allclose(relative_theta(first, first), np.tile([0, 0, 0, 1, 0, 0], (20, 1)), atol=1e-12)
    assert HUES == [3, 6]


def test_absent_objects_are_named(root):
    np.save(root / "train_images.npy", ["/0001/a/", "/0001/x/", "/0009/y/"])
    with pytest.raises(DataError, match=r"names 3 objects, and 2 of them are not in .*, such as 0001/x\. Unpack"):
        build(root)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (None, [0], r"there is no file .*train_images\.npy; copy the split files of 3DIEBench"),
        (["/0001/a/"], None, r"there is no file .*train_labels\.npy"),
        ([1, 2], [0, 0], r"train_images\.npy must list objects as strings; it holds \[2\] of int64"),
        (np.array([], dtype=str), [], r"must list objects as strings; it holds \[0\]"),
        (["/0001/a/"], [0, 1], r"for each of the 1 objects; it holds \[2\] of int64"),
        (["/0001/a/"], [-1], r"a whole number of at least 0 .* as low as -1"),
        (["/0001/a/"], [0.5], r"it holds \[1\] of float64"),
        (["/0001/a/image_0.jpg"], [0], r"names '0001/a/image_0.jpg', which is not of the form /SYNSET/OBJECT/"),
        (np.array([None]), [0], r"train_images\.npy cannot be read: .*pickle"),
    ],
)
def test_wrong_split_files(root, images, labels, message):
    for what, content in (("images", images), ("labels", labels)):
        (root / f"train_{what}.npy").unlink()
        if content is not None:
            np.save(root / f"train_{what}.npy", content, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        build(root)


@pytest.mark.parametrize("views", [1, 5, -2])
def test_wrong_numbers_of_views(root, views):
    with pytest.raises(DataError, match=rf"views={views} must lie between 2 and 4, the number of images in .*0001/a"):
        build(root, f"views={views}")


def test_an_object_without_a_pair(root):
    (root / "0001/a/image_1.jpg").unlink()
    with pytest.raises(DataError, match=r"0001/a holds 1 images; a pair needs at least image_0\.jpg and image_1\.jpg"):
        build(root)


def test_unknown_split(root):
    with pytest.raises(DataError, match="split='TEST' is unknown; known are TRAIN, VAL"):
        build(root, split="TEST")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "its latents cannot be read: .*No such file"),
        (b"", "its latents cannot be read"),
        (b"no array", "its latents cannot be read"),
        (
            np.zeros(9),
            r"latent_2\.npy beside it must hold 7 finite numbers, angle_x, .*; it holds an array \[9\]",
        ),
        (np.full(7, np.nan), r"must hold 7 finite numbers"),
        (np.array(["a"] * 7), r"it holds an array \[7\] of <U1"),
    ],
)
def test_broken_latents(root, content, message):
    path = root / "0001/a/latent_2.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    dataset = build(root)
    with pytest.raises(UnreadableImage, match=message) as error:
        dataset.read_pair(2, generator_of(0))
    assert str(error.value).startswith(str(root / "0001/a/image_2.jpg"))
    dataset.read(2)  # the image itself is fine
    pair, skipped = read_or_next(dataset, 2, lambda index: dataset.read_pair(index, generator_of(3)))
    assert len(skipped) >= 1 and pair.theta.isfinite().all()


RUN = [*TINY, "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0", "vicreg.loss_weight=1"]
RUN += ["vicreg.expander_dim=8", "equivariance.enabled=false", "crops.horizontal_flip=0"]


def train(root, folder, *overrides):
    data = f"train.dataset_path=3DIEBench:split=TRAIN:root={root}"
    return in_this_process(["train", "--config-file", "debug", "--output-dir", str(folder), *RUN, data, *overrides])


def test_a_run_on_pairs(root, tmp_path):
    assert train(root, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/training_metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["loss/vicreg"] > 0


def test_a_run_without_latents_ends_with_a_sentence(root, tmp_path, capsys):
    for path in root.rglob("latent_*.npy"):
        np.save(path, np.zeros(9))
    assert train(root, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "could not be read" in message and "must hold 7 finite numbers" in message and "Traceback" not in message
