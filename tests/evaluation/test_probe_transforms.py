import math

import pytest
import torch

from dinov2_eq.equivariance.transforms import SE2
from dinov2_eq.evaluation.probe_transforms import Crop, Flip, build_probe_transform

IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SIZE = (12, 12)


@pytest.mark.parametrize("transform", [Crop(0.2), Flip()])
def test_zero_is_the_identity(transform):
    theta = torch.zeros(3, len(transform.components))
    torch.testing.assert_close(transform.apply(IMAGES, theta, SIZE), IMAGES)


def test_crops_stay_within_the_image_and_keep_their_share():
    crop = Crop(0.2)
    theta = crop.sample(2000, torch.Generator().manual_seed(0))
    side = theta[:, 2].exp()
    assert side.min() >= math.sqrt(0.2) and side.min() < 0.46 and 0.99 < side.max() <= 1
    reach = theta[:, :2].abs() + side[:, None] / 2
    assert reach.max() <= 0.5 + 1e-6 and reach.max() > 0.499
    assert (theta >= crop.low).all() and (theta <= crop.high).all()
    shorter = crop.scaled(theta, 0.5)
    assert (shorter[:, :2].abs() + shorter[:, 2:].exp() / 2).max() <= 0.5 + 1e-6


def test_a_crop_is_the_part_it_names():
    theta = torch.tensor([[0.25, -0.25, math.log(0.5)]]).expand(3, 3)  # the upper right quarter
    quarter = Crop(0.2).apply(IMAGES, theta, (6, 6))
    torch.testing.assert_close(quarter, IMAGES[:, :, :6, 6:])


def test_flips_are_left_and_right_and_half_of_all():
    flip = Flip()
    theta = flip.sample(1000, torch.Generator().manual_seed(0))
    assert set(theta.flatten().tolist()) == {0.0, 1.0} and 0.45 < theta.mean() < 0.55
    flipped = flip.apply(IMAGES, torch.tensor([[1.0], [0.0], [1.0]]), SIZE)
    assert torch.equal(flipped, torch.stack([IMAGES[0].flip(-1), IMAGES[1], IMAGES[2].flip(-1)]))


def test_by_name():
    assert build_probe_transform("crop", min_crop_share=0.5).low[2] == pytest.approx(math.log(0.5) / 2)
    assert isinstance(build_probe_transform("flip", min_crop_share=0.5), Flip)
    se2 = build_probe_transform("se2", min_crop_share=0.5, max_angle_deg=10)
    assert isinstance(se2, SE2) and se2.max_angle_deg == 10


@pytest.mark.parametrize(
    ("name", "share", "text"),
    [
        ("flipp", 0.5, r"Unknown task 'flipp'; available: .*crop, flip.* Did you mean 'flip'\?"),
        ("crop", 0.0, r"in \(0, 1\], got 0"),
        ("crop", 1.5, r"in \(0, 1\], got 1\.5"),
        ("no_such_module:Gamma", 0.5, "cannot be imported"),
    ],
)
def test_mistakes(name, share, text):
    with pytest.raises(ValueError, match=text):
        build_probe_transform(name, min_crop_share=share)
