"""The batched photometric operations against torchvision's, image by image."""

import itertools

import pytest
import torch
import torchvision.transforms.functional as oracle

from dinov2_eq.data.photometric import apply_photometric
from dinov2_eq.equivariance import photometric as primitives
from dinov2_eq.types import PhotometricParams

TOLERANCE = {"atol": 3e-4, "rtol": 0.0}  # torchvision's grey weights add up to 0.9999


def identity_params(batch):
    ones, zeros, no = torch.ones(batch), torch.zeros(batch), torch.zeros(batch, dtype=torch.bool)
    order = torch.arange(4).repeat(batch, 1)
    return PhotometricParams(ones, ones.clone(), ones.clone(), zeros, order, no, zeros.clone(), no.clone())


def random_params(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.empty(batch).uniform_(low, high, generator=generator)

    return PhotometricParams(
        brightness=uniform(0.6, 1.4),
        contrast=uniform(0.6, 1.4),
        saturation=uniform(0.8, 1.2),
        hue=uniform(-0.1, 0.1),
        order=torch.rand(batch, 4, generator=generator).argsort(1),
        grey=uniform(0, 1) < 0.3,
        blur_sigma=uniform(-1.0, 2.0).clamp(min=0),
        solarize=uniform(0, 1) < 0.3,
    )


def by_torchvision(image, params, row):
    adjust = (
        (oracle.adjust_brightness, params.brightness),
        (oracle.adjust_contrast, params.contrast),
        (oracle.adjust_saturation, params.saturation),
        (oracle.adjust_hue, params.hue),
    )
    for number in params.order[row].tolist():
        function, values = adjust[number]
        image = function(image, values[row].item())
    if params.grey[row]:
        image = oracle.rgb_to_grayscale(image, 3)
    if params.blur_sigma[row] > 0:
        image = oracle.gaussian_blur(image, 9, params.blur_sigma[row].item())
    return oracle.solarize(image, 128 / 255) if params.solarize[row] else image


def test_whole_augmentation_equals_torchvision():
    images, params = torch.rand(32, 3, 12, 15), random_params(32)
    # Solarize jumps at its threshold: leave it to the test below.
    params = params._replace(solarize=torch.zeros(32, dtype=torch.bool))
    expected = torch.stack([by_torchvision(images[row], params, row) for row in range(32)])
    torch.testing.assert_close(apply_photometric(images, params), expected, **TOLERANCE)


def test_order_of_the_jitter_matters_and_is_followed():
    image = torch.rand(1, 3, 8, 8).repeat(24, 1, 1, 1)
    order = torch.tensor([[*p] for p in itertools.permutations(range(4))])
    params = identity_params(24)._replace(
        brightness=torch.full((24,), 1.4), contrast=torch.full((24,), 0.6), saturation=torch.full((24,), 1.8),
        hue=torch.full((24,), 0.1), order=order,
    )  # fmt: skip
    results = apply_photometric(image, params)
    expected = torch.stack([by_torchvision(image[row], params, row) for row in range(24)])
    torch.testing.assert_close(results, expected, **TOLERANCE)
    assert (results[0] - results[-1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "values", "function"),
    [
        ("adjust_brightness", [0.0, 0.5, 1.0, 1.7], oracle.adjust_brightness),
        ("adjust_contrast", [0.0, 0.5, 1.0, 1.7], oracle.adjust_contrast),
        ("adjust_saturation", [0.0, 0.5, 1.0, 1.7], oracle.adjust_saturation),
        ("adjust_hue", [-0.5, -0.1, 0.0, 0.3], oracle.adjust_hue),
        ("gaussian_blur", [0.1, 0.5, 1.0, 2.0], lambda image, sigma: oracle.gaussian_blur(image, 9, sigma)),
    ],
)
def test_primitives_equal_torchvision(name, values, function):
    images = torch.rand(4, 3, 9, 11)
    result = vars(primitives)[name](images, torch.tensor(values))
    expected = torch.stack([function(image, value) for image, value in zip(images, values, strict=True)])
    torch.testing.assert_close(result, expected, **TOLERANCE)


def test_grey_and_solarize():
    images = torch.tensor([0.0, 127 / 255, 128 / 255, 1.0]).view(1, 1, 1, 4).repeat(2, 3, 1, 1)
    params = identity_params(2)._replace(solarize=torch.tensor([True, False]))
    solarized, same = apply_photometric(images, params)
    torch.testing.assert_close(solarized[0, 0], torch.tensor([0.0, 127 / 255, 127 / 255, 0.0]))
    assert torch.equal(same, images[1])
    colours = torch.rand(2, 3, 4, 4)
    grey = apply_photometric(colours, identity_params(2)._replace(grey=torch.tensor([False, True])))
    assert torch.equal(grey[0], colours[0])
    assert torch.equal(grey[1, 0], grey[1, 1]) and torch.equal(grey[1, 0], grey[1, 2])


def test_identity_is_bit_identical_and_the_input_is_kept():
    images = torch.rand(6, 3, 10, 10)
    assert torch.equal(apply_photometric(images, identity_params(6)), images)
    params = random_params(6)
    mixed = PhotometricParams(*(torch.cat([a[:3], b[3:]]) for a, b in zip(identity_params(6), params, strict=True)))
    before = images.clone()
    result = apply_photometric(images, mixed)
    assert torch.equal(images, before)
    assert torch.equal(result[:3], images[:3])
    assert not torch.equal(result[3:], images[3:])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 4), (5, 5)])
def test_images_smaller_than_the_blur_kernel(size):
    images = torch.rand(5, 3, *size)
    params = random_params(5)._replace(blur_sigma=torch.full((5,), 2.0))
    result = apply_photometric(images, params)
    assert result.shape == images.shape
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


def test_empty_batch():
    assert apply_photometric(torch.rand(0, 3, 4, 4), random_params(0)).shape == (0, 3, 4, 4)


def test_no_blur_is_the_identity_of_the_primitive():
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(primitives.gaussian_blur(images, torch.zeros(2)), images)
