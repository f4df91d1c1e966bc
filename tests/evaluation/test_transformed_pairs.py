from dataclasses import replace

import pytest
import torch
from torch import nn

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.evaluation.encoder import Encoder
from dinov2_eq.evaluation.transformed_pairs import Appearance, SizedImages, draw_theta, extract_pairs, settings_of
from tests.processes import run_ranks

SIZE = 16
TASKS = {name: build_transform(name) for name in ("rotation", "translation", "color_jitter", "blur")}
TASKS["se2"] = build_transform("se2", max_shift=0.2)


class Pixels(nn.Module):
    """Its "class token" is the image, so pairs hold the pixels that an encoder would see."""

    def forward(self, x, masks=None, is_training=False):
        return {"x_norm_clstoken": x.flatten(1), "x_norm_patchtokens": -x.flatten(1)[:, None]}


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
        device=torch.device("cpu"),
        batch_size=batch_size,
        num_workers=0,
    )
    pairs = {
        (setting.task, setting.border): features.pairs("trained", setting, "cls").unflatten(1, (2, 3, SIZE, SIZE))
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
    (images,) = make_eval_loader(dataset, range(6), SIZE, batch_size=6)
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
        device=torch.device("cpu"),
        batch_size=2,
        num_workers=0,
    )
    first, second = (features.pairs(name, settings[0], "both") for name in encoders)
    assert torch.equal(first, second) and first.shape == (3, 2 * 2 * 3 * SIZE * SIZE)


def test_tokens_are_parts_of_one_forward():
    settings = settings_of("blur", TASKS["blur"], SIZE)
    theta = {"blur": draw_theta("blur", TASKS["blur"], 3, 2, "train")}
    wide = Appearance(SIZE + 4, None)
    features = extract_pairs(
        {"trained": pixel_encoder()},
        settings,
        theta,
        build_dataset("Shapes:num=3:size=16"),
        range(3),
        tokens=["cls", "mean", "both"],
        appearances=[wide],
        device=torch.device("cpu"),
        batch_size=2,
        num_workers=0,
    )
    cls_token, mean_patch, both = (
        features.of_transformed("trained", settings[0], kind) for kind in ("cls", "mean", "both")
    )
    assert torch.equal(mean_patch, -cls_token) and torch.equal(both, torch.cat([cls_token, mean_patch], dim=1))
    assert cls_token.shape == (2 * 3, 3 * SIZE * SIZE)
    image = features.of_images("trained", settings[0].appearance, "cls")
    assert torch.equal(features.pairs("trained", settings[0], "cls")[:3, : 3 * SIZE * SIZE], image)
    assert not torch.equal(features.of_images("trained", wide, "cls"), image)


def test_the_equivariant_half_of_what_is_pooled():
    half = nn.Linear(3 * SIZE * SIZE, 5)
    encoder = replace(pixel_encoder(), equivariant=half.requires_grad_(False))
    settings, data = settings_of("blur", TASKS["blur"], SIZE), build_dataset("Shapes:num=3:size=16")
    theta = {"blur": draw_theta("blur", TASKS["blur"], 3, 1, "train")}
    options = {"device": torch.device("cpu"), "batch_size": 2, "num_workers": 0}
    tokens = ["equi", "mean", "grid2", "equi_grid2"]
    features = extract_pairs({"trained": encoder}, settings, theta, data, range(3), tokens=tokens, **options)
    equi, mean, grid2, equi_grid2 = (features.of_transformed("trained", settings[0], kind) for kind in tokens)
    torch.testing.assert_close(equi, half(mean))
    assert torch.equal(grid2, mean.repeat(1, 4))  # there is one patch token
    torch.testing.assert_close(equi_grid2, equi.repeat(1, 4))
    with pytest.raises(ValueError, match=r"plain has no equivariant half: .* Leave out --tokens equi and equi_grid2"):
        extract_pairs({"plain": pixel_encoder()}, settings, theta, data, range(3), tokens=["equi"], **options)


def extract_on_rank(num_images):
    with process_group(find_launch(), torch.device("cpu"), 60):
        pairs, _ = extract(build_dataset(f"Shapes:num={num_images}:size=16"), ["rotation"], 2, 2, None, num_images)
        return {"/".join(key): rows.numpy() for key, rows in pairs.items()}


def test_three_processes_find_what_one_does():
    expected, _ = extract(build_dataset("Shapes:num=7:size=16"), ["rotation"], draws=2, num_images=7)
    for found in run_ranks(extract_on_rank, 3, 7):
        for key, rows in expected.items():
            torch.testing.assert_close(torch.from_numpy(found["/".join(key)]), rows)


def test_no_images():
    with pytest.raises(ValueError, match="has no images"):
        extract(build_dataset("Shapes:num=7:size=16"), ["blur"], num_images=0)


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
