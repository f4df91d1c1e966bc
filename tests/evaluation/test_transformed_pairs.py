import pytest
import torch
from torch import nn

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.evaluation.encoder import Encoder
from dinov2_eq.evaluation.transformed_pairs import SizedImages, draw_theta, extract_pairs, settings_of

SIZE = 16
TASKS = {name: build_transform(name) for name in ("rotation", "translation", "color_jitter", "blur")}
TASKS["se2"] = build_transform("se2", max_shift=0.2)


class Pixels(nn.Module):
    """Its "class token" is the image, so pairs hold the pixels that an encoder would see."""

    def forward(self, x, masks=None, is_training=False):
        return {"x_norm_clstoken": x.flatten(1), "x_norm_patchtokens": x.flatten(2).transpose(1, 2)}


class White(torch.utils.data.Dataset):
    labels = None

    def __len__(self):
        return 6

    def read(self, index):
        from PIL import Image

        return Image.new("RGB", (40, 40), "white")


def pixel_encoder():
    return Encoder(Pixels(), SIZE, [0.0] * 3, [1.0] * 3, {}, 0, {})


def extract(dataset, tasks, draws=1, batch_size=4, encoders=None, num_images=6):
    settings = [setting for name in tasks for setting in settings_of(name, TASKS[name], SIZE)]
    theta = {name: draw_theta(name, TASKS[name], num_images, draws, "train") for name in tasks}
    features = extract_pairs(
        encoders or {"trained": pixel_encoder()},
        settings,
        theta,
        dataset,
        range(num_images),
        mode="cls",
        device=torch.device("cpu"),
        batch_size=batch_size,
        num_workers=0,
    )
    pairs = {
        (setting.task, setting.border): features.pairs("trained", setting).unflatten(1, (2, 3, SIZE, SIZE))
        for setting in settings
    }
    return pairs, theta


def test_borders_of_each_task():
    assert [setting.border for setting in settings_of("rotation", TASKS["rotation"], 32)] == [
        "zeros",
        "masked",
        "canvas",
    ]
    assert [setting.border for setting in settings_of("blur", TASKS["blur"], 32)] == ["none", "masked"]
    canvas = settings_of("translation", TASKS["translation"], 224)[2]
    assert canvas.appearance.side >= 244
    with pytest.raises(ValueError, match=r"translation: shifts up to 0\.5"):
        settings_of("translation", build_transform("translation", max_shift=0.5), 32)


def test_border_pixels_show_with_zeros_and_not_otherwise():
    tasks = ("rotation", "translation", "se2")
    pairs, _ = extract(White(), tasks, draws=50)
    for task in tasks:
        zeros, masked, canvas = (pairs[task, border] for border in ("zeros", "masked", "canvas"))
        assert zeros[:, 0].min() == 1 and zeros[:, 1].min() < 0.9  # black came in
        torch.testing.assert_close(masked[:, 0], masked[:, 1])  # the discs are equal, so nothing came in
        assert masked.amin() == 0 and masked.amax() == 1
        torch.testing.assert_close(canvas, torch.ones_like(canvas))


def test_images_and_transformed_images_are_in_order():
    dataset = build_dataset("Shapes:num=6:size=16")
    pairs, theta = extract(dataset, ["color_jitter", "rotation"], draws=2)
    ((images, _),) = make_eval_loader(dataset, range(6), SIZE, batch_size=6)
    for draw, rows in enumerate(pairs["color_jitter", "none"].split(6)):
        torch.testing.assert_close(rows[:, 0], images)
        expected = TASKS["color_jitter"].apply(images, theta["color_jitter"][draw], (SIZE, SIZE))
        torch.testing.assert_close(rows[:, 1], expected)
    assert not torch.equal(theta["rotation"][0], theta["rotation"][1])
    torch.testing.assert_close(pairs["rotation", "zeros"][:6, 0], images)
    canvas_image = pairs["rotation", "canvas"][:6, 0]
    assert canvas_image.shape == images.shape and not torch.equal(canvas_image, images)


def test_batches_change_nothing():
    dataset = build_dataset("Shapes:num=6:size=16")
    for whole, parts in zip(*(extract(dataset, ["blur"], batch_size=size)[0].values() for size in (6, 4)), strict=True):
        torch.testing.assert_close(whole, parts)


def test_two_encoders_see_the_same():
    encoders = {"trained": pixel_encoder(), "random-init": pixel_encoder()}
    settings = settings_of("blur", TASKS["blur"], SIZE)
    theta = {"blur": draw_theta("blur", TASKS["blur"], 3, 1, "val")}
    dataset = build_dataset("Shapes:num=3:size=16")
    features = extract_pairs(
        encoders,
        settings,
        theta,
        dataset,
        range(3),
        mode="both",
        device=torch.device("cpu"),
        batch_size=2,
        num_workers=0,
    )
    first, second = (features.pairs(name, settings[0]) for name in encoders)
    assert torch.equal(first, second) and first.shape == (3, 2 * (3 * SIZE * SIZE + 3))


def test_theta_is_fixed_and_differs_between_splits():
    first, again, val = (draw_theta("blur", TASKS["blur"], 50, 2, split) for split in ("train", "train", "val"))
    assert torch.equal(first, again) and not torch.equal(first, val) and first.shape == (2, 50, 1)
    assert first.min() >= 0.1 and first.max() <= 2.0


def test_sides_are_resized_from_one_decoded_image():
    reads = []

    class Counting(White):
        def read(self, index):
            reads.append(index)
            return super().read(index)

    images = SizedImages(Counting(), 16, [16, 24, 18])[2]
    assert {side: tuple(image.shape) for side, image in images.items()} == {s: (3, s, s) for s in (16, 24, 18)}
    assert reads == [2]
