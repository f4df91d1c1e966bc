import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.data.augmentations import MultiCrop, make_views
from dinov2_eq.data.collate import Collate
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.equivariance.pairing import NoPairing, TransformPairing
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.settings import CropsConfig
from dinov2_eq.types import GLOBAL, LOCAL, PATH, PathViews

TRANSFORMS = ("rotation", "translation", "se2", "color_jitter", "blur")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def pairing_of(transform, border="canvas"):
    return NoPairing() if transform is None else TransformPairing(transform, border)


def make_multi_crop(transform=None, border="canvas", num_local=3, **changes):
    crops = CropsConfig(global_crops_size=32, local_crops_size=16, **changes)
    return MultiCrop(crops, pairing_of(transform, border), num_local)


def draw(multi_crop, seed=0, image=None):
    image = build_dataset("Shapes:size=96").read(seed) if image is None else image
    return multi_crop(image, torch.Generator().manual_seed(seed))


def make_batch(multi_crop, batch_size=4):
    collate = Collate(BlockMasking((4, 4), (0.1, 0.5), 0.5), 0, batch_size)
    return collate([draw(multi_crop, seed)._replace(position=seed) for seed in range(batch_size)])


def views_of(batch, transform=None, num_intermediates=2, mean=MEAN, std=STD, path=None):
    """Views and K targets at k / (K + 1), or without a transform none."""
    crops = CropsConfig(global_crops_size=32, local_crops_size=16, mean=list(mean), std=list(std))
    steps = num_intermediates + 1
    targets = [step / steps for step in range(1, steps)] if transform else []
    return make_views(batch, crops=crops, pairing=pairing_of(transform), targets=targets, path=path)


def test_sample_has_uint8_crops_of_the_right_sizes():
    transform = build_transform("se2")
    sample = draw(make_multi_crop(transform))
    assert sample.anchor_crop.shape == (3, 32, 32)
    assert sample.base_canvas.shape == (3, *transform.canvas_size((32, 32)))
    assert sample.local_crops.shape == (3, 3, 16, 16)
    assert {crop.dtype for crop in (sample.anchor_crop, sample.base_canvas, sample.local_crops)} == {torch.uint8}
    assert sample.drawn.theta.shape == (3,)
    assert sample.photometric.brightness.shape == (5,) and sample.photometric.order.shape == (5, 4)


@pytest.mark.parametrize("border", ["zeros", "canvas"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_crops_are_the_same_with_any_transform_and_without(name, border):
    for seed in range(6):
        plain = draw(make_multi_crop(), seed)
        sample = draw(make_multi_crop(build_transform(name), border), seed)
        assert torch.equal(sample.anchor_crop, plain.anchor_crop)
        assert torch.equal(sample.local_crops, plain.local_crops)
        assert all(torch.equal(a, b) for a, b in zip(sample.photometric, plain.photometric, strict=True))
        margin = (sample.base_canvas.shape[-1] - 32) // 2
        centre = sample.base_canvas[:, margin : margin + 32, margin : margin + 32]
        if border == "zeros" or margin == 0:
            assert torch.equal(sample.base_canvas, plain.base_canvas)
        else:
            assert (centre.int() - plain.base_canvas.int())[:, 3:-3, 3:-3].abs().max() <= 1


def test_theta_is_within_its_range():
    transform = build_transform("se2")
    thetas = torch.stack([draw(make_multi_crop(transform), seed).drawn.theta for seed in range(40)])
    assert (thetas >= transform.low).all() and (thetas <= transform.high).all()
    assert thetas[:, 0].std() > 10


def test_frequencies_and_ranges_of_the_photometric_draw():
    multi_crop = make_multi_crop(num_local=4)
    generator = torch.Generator().manual_seed(0)
    draws = [multi_crop._draw_photometric(generator) for _ in range(600)]
    brightness, _, saturation, hue, order, grey, sigma, solarize = (torch.stack(v) for v in zip(*draws, strict=True))
    blurred = (sigma > 0).float().mean(0)
    torch.testing.assert_close(blurred, torch.tensor([0.0, 0.9, 0.5, 0.5, 0.5, 0.5]), atol=0.07, rtol=0)
    torch.testing.assert_close(solarize.float().mean(0), torch.tensor([0.0, 0.2, 0, 0, 0, 0]), atol=0.06, rtol=0)
    assert grey.float().mean() == pytest.approx(0.2, abs=0.04)
    assert (brightness != 1).float().mean() == pytest.approx(0.8, abs=0.04)
    assert ((brightness != 1) == (hue != 0)).all()
    assert brightness.min() >= 0.6 and brightness.max() <= 1.4 and brightness.max() > 1.35
    assert saturation.min() >= 0.8 and saturation.max() <= 1.2
    assert hue.abs().max() <= 0.1
    assert sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2.0
    assert (order.sort(-1).values == torch.arange(4)).all()
    assert (order[..., 0].flatten().bincount() / order[..., 0].numel() - 0.25).abs().max() < 0.05


def test_flips():
    image = build_dataset("Shapes:size=64").read(0)
    transform = build_transform("se2")
    whole = {"global_crops_scale": (1.0, 1.0)}
    plain = draw(make_multi_crop(transform, horizontal_flip=0.0, **whole), 1, image)
    flipped = draw(make_multi_crop(transform, horizontal_flip=1.0, **whole), 1, image)
    assert torch.equal(plain.anchor_crop.flip(-1), flipped.anchor_crop)
    assert torch.equal(plain.base_canvas.flip(-1), flipped.base_canvas)
    assert torch.equal(plain.local_crops.flip(-1), flipped.local_crops)


def test_turned_views():
    image = build_dataset("Shapes:size=64").read(0)
    transform = build_transform("se2")
    plain, turned = (
        draw(make_multi_crop(transform, max_rotation_deg=angle, num_local=2), 1, image) for angle in (0.0, 180.0)
    )
    assert turned.anchor_crop.shape == plain.anchor_crop.shape and turned.base_canvas.shape == plain.base_canvas.shape
    assert not torch.equal(turned.anchor_crop, plain.anchor_crop)
    assert not torch.equal(turned.local_crops[0], plain.local_crops[0])
    for name, same in zip(plain.photometric._fields, plain.photometric, strict=True):
        assert torch.equal(same, getattr(turned.photometric, name))
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    crop = draw(make_multi_crop(transform, max_rotation_deg=180.0), 1, grey)
    assert (crop.base_canvas == 90).all() and (crop.anchor_crop == 90).all()


@pytest.mark.parametrize("changes", [{}, {"max_rotation_deg": 180.0}])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (400, 2)])
def test_tiny_and_extreme_images(size, changes):
    sample = draw(make_multi_crop(build_transform("se2"), **changes), image=Image.new("RGB", size, (1, 2, 3)))
    assert (sample.base_canvas.float().mean((1, 2)) == torch.tensor([1.0, 2.0, 3.0])).all()


def test_no_local_crops():
    batch = make_batch(make_multi_crop(num_local=0))
    assert batch.local_crops.shape == (0, 4, 3, 16, 16)
    assert LOCAL not in views_of(batch).groups


def test_unknown_border():
    with pytest.raises(ValueError, match=r"'mirror'.*zeros, canvas"):
        make_multi_crop(build_transform("se2"), border="mirror")


# make_views


@pytest.mark.parametrize("border", ["zeros", "canvas"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_shapes_of_the_views(name, border):
    transform = build_transform(name)
    batch = make_batch(make_multi_crop(transform, border))
    for num_intermediates in (0, 1, 3):
        views = views_of(batch, transform, num_intermediates)
        assert views.groups[GLOBAL].images.shape == (2, 4, 3, 32, 32)
        assert views.groups[LOCAL].images.shape == (3, 4, 3, 16, 16)
        assert views.targets.shape == (num_intermediates, 4, 3, 32, 32)
        assert views.groups[GLOBAL].masks is batch.masks and batch.masks.shape == (2, 4, 16)
        assert all(group.images.isfinite().all() for group in views.groups.values())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_targets_lie_on_the_way_from_the_base_to_the_transformed_view(name):
    transform = build_transform(name)
    batch = make_batch(make_multi_crop(transform))
    views = views_of(batch, transform, 1, mean=(0, 0, 0), std=(1, 1, 1))
    half = batch._replace(theta=transform.scaled(batch.theta, 0.5))
    expected = views_of(half, transform, 0, mean=(0, 0, 0), std=(1, 1, 1)).groups[GLOBAL].images[1]
    torch.testing.assert_close(views.targets[0], expected)
    assert (views.targets[0] - views.groups[GLOBAL].images[1]).abs().mean() > 1e-4
    for num_intermediates in (0, 4):  # K changes neither v1 nor v2
        other = views_of(batch, transform, num_intermediates, mean=(0, 0, 0), std=(1, 1, 1))
        torch.testing.assert_close(other.groups[GLOBAL].images, views.groups[GLOBAL].images)


def test_without_a_transform_the_base_view_is_the_second_global_crop():
    batch = make_batch(make_multi_crop(jitter_prob=0.0, grey_prob=0.0, blur_prob=(0, 0, 0), solarize_prob=0.0))
    views = views_of(batch)
    assert views.targets.shape == (0, 4, 3, 32, 32)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(views.groups[GLOBAL].images[0], (batch.anchor_crops / 255 - mean) / std)
    torch.testing.assert_close(views.groups[GLOBAL].images[1], (batch.base_canvases / 255 - mean) / std)
    torch.testing.assert_close(views.groups[LOCAL].images, (batch.local_crops / 255 - mean) / std)


def test_with_the_identity_the_transformed_view_is_the_base_view():
    transform = build_transform("se2")
    batch = make_batch(make_multi_crop(transform))
    still = views_of(batch._replace(theta=torch.zeros_like(batch.theta)), transform, 1)
    torch.testing.assert_close(still.groups[GLOBAL].images[1], still.targets[0])
    plain = views_of(make_batch(make_multi_crop()))
    assert torch.equal(still.groups[GLOBAL].images[0], plain.groups[GLOBAL].images[0])
    assert torch.equal(still.groups[LOCAL].images, plain.groups[LOCAL].images)


@pytest.mark.parametrize(("border", "black_expected"), [("canvas", False), ("zeros", True)])
def test_black_comes_in_without_a_canvas_only(border, black_expected):
    transform = build_transform("se2")
    multi_crop = make_multi_crop(transform, border, jitter_prob=0.0, solarize_prob=0.0)
    white = Image.fromarray(np.full((50, 70, 3), 255, dtype=np.uint8))
    collate = Collate(BlockMasking((4, 4), (0.1, 0.5), 0.0), 0, 8)
    batch = collate([draw(multi_crop, seed, white) for seed in range(8)])
    views = views_of(batch, transform, 2, mean=(0, 0, 0), std=(1, 1, 1))
    darkest = torch.cat([views.targets, views.groups[GLOBAL].images[1:]]).amin((0, 2, 3, 4))
    assert ((darkest < 0.5).any().item()) is black_expected
    if not black_expected:
        assert darkest.min() > 0.99


@pytest.mark.parametrize("local_size", [False, True])
def test_a_path_of_some_images(local_size):
    transform = build_transform("se2")
    batch = make_batch(make_multi_crop(transform))._replace(path_rows=torch.tensor([1, 3]))
    path = PathViews((0.5, 1.0), share=0.5, local_size=local_size)
    views = views_of(batch, transform, 1, path=path)
    images = views.groups[PATH].images
    assert images.shape == (2, 2, 3, 16, 16) if local_size else (2, 2, 3, 32, 32)
    without = views_of(batch, transform, 1)
    expected = torch.stack([without.targets[0], without.groups[GLOBAL].images[1]])[:, [1, 3]]
    torch.testing.assert_close(views.targets[0], images[0])  # K = 1: the target lies at half of theta too
    if local_size:
        expected = torch.nn.functional.interpolate(
            expected.flatten(0, 1), (16, 16), mode="bilinear", antialias=True
        ).unflatten(0, (2, 2))
    torch.testing.assert_close(images, expected)


def test_the_second_view_may_stay_untransformed():
    transform = build_transform("se2")
    batch = make_batch(make_multi_crop(transform))
    crops = CropsConfig(global_crops_size=32, local_crops_size=16)
    pairing = TransformPairing(transform, "canvas", second=0.0)
    views = make_views(batch, crops=crops, pairing=pairing, targets=[0.0, 1.0])
    assert torch.equal(views.groups[GLOBAL].images[1], views.targets[0])
    assert (views.targets[1] - views.targets[0]).abs().mean() > 0.01
