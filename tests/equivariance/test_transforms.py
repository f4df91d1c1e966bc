"""The family of transforms: ranges, fractions, identity, oracles, and how a user adds one."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from dinov2_eq.equivariance.transforms import TRANSFORMS, Transform, build_transform, register_transform

NAMES = ["rotation", "translation", "se2", "color_jitter", "blur", "all"]
SIZES = [(32, 32), (24, 40)]


def images(size=(32, 32), batch=4):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_theta_zero_is_the_identity(name, size):
    transform = build_transform(name)
    theta = torch.zeros(4, len(transform.components))
    torch.testing.assert_close(transform.apply(images(size), theta, size), images(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_samples_fill_the_range(name):
    transform = build_transform(name)
    theta = transform.sample(2000, torch.Generator().manual_seed(0))
    assert theta.shape == (2000, len(transform.components))
    span = transform.high - transform.low
    assert (theta >= transform.low).all() and (theta <= transform.high).all()
    assert ((theta.amax(0) - theta.amin(0)) > 0.98 * span).all()


def test_all_is_se2_then_colour_then_blur():
    transform, parts = build_transform("all"), [build_transform(name) for name in ("se2", "color_jitter", "blur")]
    theta = transform.sample(4, torch.Generator().manual_seed(1))
    canvas = transform.canvas_size((32, 32))
    assert canvas == parts[0].canvas_size((32, 32)) != (32, 32)
    expected = parts[0].apply(images(canvas), theta[:, :3], (32, 32))
    expected = parts[2].apply(parts[1].apply(expected, theta[:, 3:7], (32, 32)), theta[:, 7:], (32, 32))
    torch.testing.assert_close(transform.apply(images(canvas), theta, (32, 32)), expected)
    assert transform.components == tuple(name for part in parts for name in part.components)
    assert torch.equal(transform.high, torch.cat([part.high for part in parts]))


def test_one_of_all_draws_one_of_them():
    transform = build_transform("one_of_all")
    theta = transform.sample(4000, torch.Generator().manual_seed(0))
    kinds = {"angle_deg": 0, "shift_x": 1, "shift_y": 1, "blur_sigma": 3}
    drawn = theta != 0
    which = torch.zeros(4000, 4)
    for column, name in enumerate(transform.components):
        which[drawn[:, column], kinds.get(name, 2)] = 1
    assert (which.sum(1) == 1).all() and (which.mean(0) - 0.25).abs().max() < 0.03
    assert drawn[which[:, 2] == 1][:, 3:7].all() and theta.amax(0)[7] > 1.9
    assert (theta <= transform.high).all() and (theta >= transform.low.clamp(max=0)).all()


def test_published_ranges():
    highs = {name: build_transform(name).high.tolist() for name in NAMES}
    assert highs["rotation"] == [45]
    assert highs["translation"] == pytest.approx([10 / 224] * 2)
    assert highs["se2"] == pytest.approx([45, 10 / 224, 10 / 224])
    assert highs["color_jitter"] == pytest.approx([0.4, 0.4, 0.4, 0.1])
    assert highs["blur"] == [2] and build_transform("blur").low.tolist() == pytest.approx([0.1])


def test_a_third_of_thirty_degrees_is_ten():
    transform = build_transform("rotation")
    theta = torch.tensor([[30.0]])
    assert [transform.scaled(theta, k / 3).item() for k in (1, 2)] == pytest.approx([10, 20])


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_is_transformed_image_by_image(name):
    transform = build_transform(name)
    theta = transform.sample(4, torch.Generator().manual_seed(1))
    together = transform.apply(images(), theta, (32, 32))
    alone = torch.cat([transform.apply(images()[i : i + 1], theta[i : i + 1], (32, 32)) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_color_jitter_equals_torchvision():
    transform = build_transform("color_jitter")
    theta = transform.sample(4, torch.Generator().manual_seed(1))
    expected = []
    for image, (brightness, contrast, saturation, hue) in zip(images(), theta.tolist(), strict=True):
        image = tvf.adjust_brightness(image, 1 + brightness)
        image = tvf.adjust_contrast(image, 1 + contrast)
        image = tvf.adjust_saturation(image, 1 + saturation)
        expected.append(tvf.adjust_hue(image, hue))
    torch.testing.assert_close(transform.apply(images(), theta, (32, 32)), torch.stack(expected), atol=2e-3, rtol=0)


def test_blur_equals_torchvision():
    theta = torch.tensor([[0.3], [0.8], [1.4], [2.0]])
    blurred = build_transform("blur").apply(images(), theta, (32, 32))
    expected = [
        tvf.gaussian_blur(image, [9, 9], [sigma]) for image, (sigma,) in zip(images(), theta.tolist(), strict=True)
    ]
    torch.testing.assert_close(blurred, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_image(name):
    transform = build_transform(name)
    image = images().requires_grad_()
    transform.apply(image, transform.sample(4, torch.Generator().manual_seed(1)), (32, 32)).sum().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0


def test_only_motions_need_a_canvas():
    sizes = {name: build_transform(name).canvas_size((32, 32)) for name in NAMES}
    assert sizes["color_jitter"] == sizes["blur"] == (32, 32)
    assert sizes["rotation"] == (46, 46)
    assert sizes["se2"] > sizes["rotation"] > sizes["translation"] > (32, 32)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"transform='rotaton' is unknown; available: .*Did you mean 'rotation'"):
        build_transform("rotaton")


def test_a_user_registers_a_transform(monkeypatch):
    monkeypatch.setattr("dinov2_eq.equivariance.transforms.TRANSFORMS", dict(TRANSFORMS))

    @register_transform("invert")
    class Invert(Transform):
        components = ("amount",)

        def __init__(self, ranges):
            super().__init__(low=[0.0], high=[1.0])

        def apply(self, images, theta, size):
            amount = theta[:, 0, None, None, None]
            return images * (1 - amount) + (1 - images) * amount

    transform = build_transform("invert", max_angle_deg=10.0)
    torch.testing.assert_close(transform.apply(images(), torch.ones(4, 1), (32, 32)), 1 - images())


def test_a_transform_by_its_import_path():
    assert build_transform("dinov2_eq.equivariance.transforms:Rotation", max_angle_deg=7.0).high.tolist() == [7]
    with pytest.raises(ValueError, match="has no Transform named 'Nothing'"):
        build_transform("dinov2_eq.equivariance.transforms:Nothing")
    with pytest.raises(ValueError, match=r"transform='no_such_module:Gamma'.*PYTHONPATH=\."):
        build_transform("no_such_module:Gamma")
