import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import InterpolationMode, rotate

from dinov2_eq.data.crops import RATIO_MIN_MAX, Box, crop_resized, crop_turned, draw_crop_box
from dinov2_eq.data.datasets import build_dataset


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(40, 30), (64, 64), (300, 9), (9, 300), (1, 1), (2, 1), (5, 3)])
def test_boxes_are_those_of_torchvision(size, scale):
    image = torch.zeros(3, size[1], size[0])
    for seed in range(20):
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(RATIO_MIN_MAX))
        box = draw_crop_box(size, scale, torch.Generator().manual_seed(seed))
        if height and width:  # torchvision's fallback may be empty on tiny images
            assert box == (left, top, width, height)
        assert box.width >= 1 and box.height >= 1


def test_pixels_are_those_of_a_cropped_and_resized_image():
    image = build_dataset("Shapes:size=96").read(0)
    box = Box(10, 20, 60, 48)
    crop = crop_resized(image, box, (24, 32))
    expected = np.asarray(image.crop((10, 20, 70, 68)).resize((32, 24), Image.Resampling.BICUBIC))
    assert crop.shape == (24, 32, 3)
    # At the border we see the pixels beyond the box, which a cropped image lacks.
    assert np.abs(crop[2:-2, 2:-2].astype(int) - expected[2:-2, 2:-2]).max() <= 1


@pytest.mark.parametrize("box", [Box(20, 20, 50, 50), Box(0, 0, 96, 96), Box(0, 30, 40, 66), Box(10, 3, 70, 52)])
def test_centre_of_the_canvas_is_the_plain_crop(box):
    image = build_dataset("Shapes:size=96").read(4)
    plain = crop_resized(image, box, (32, 32)).astype(int)
    canvas = crop_resized(image, box.enlarged(52 / 32, 50 / 32), (50, 52))
    difference = np.abs(canvas[9:-9, 10:-10] - plain)
    assert difference[2:-2, 2:-2].max() <= 1
    assert difference.mean() < 1


def test_beyond_the_image_it_is_mirrored():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)[..., None].repeat(3, axis=2) * 10
    canvas = crop_resized(Image.fromarray(pixels), Box(-2, -1, 8, 6), (6, 8))
    assert (canvas == np.pad(pixels, ((1, 1), (2, 2), (0, 0)), mode="reflect")).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2)])
def test_tiny_images_have_a_canvas(size):
    image = Image.new("RGB", size, (10, 200, 30))
    canvas = crop_resized(image, Box(0, 0, *size).enlarged(1.6, 1.6), (20, 20))
    assert (canvas == [10, 200, 30]).all()


def test_no_angle_is_the_plain_crop():
    image = build_dataset("Shapes:size=96").read(0)
    box = Box(10, 20, 60, 48)
    assert np.array_equal(crop_turned(image, box, (24, 32), 0.0), crop_resized(image, box, (24, 32)))


@pytest.mark.parametrize("angle_deg", [90.0, -90.0, 180.0])
def test_right_angles(angle_deg):
    image = build_dataset("Shapes:size=96").read(0)
    box = Box(16, 24, 48, 48)
    turned = crop_turned(image, box, (24, 24), angle_deg).astype(int)
    expected = np.rot90(crop_resized(image, box, (24, 24)), round(angle_deg / 90)).astype(int)
    assert np.abs(turned - expected)[1:-1, 1:-1].max() <= 4


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize("angle_deg", [10.0, -37.0, 140.0])
def test_turned_crops_are_crops_of_the_turned_image(angle_deg, size):
    """The box lies in the middle and keeps its resolution, so turning the whole image does the same."""
    image = build_dataset("Shapes:size=128").read(3)
    height, width = size
    box = Box((128 - width) / 2, (128 - height) / 2, width, height)
    turned = np.asarray(rotate(image, angle_deg, InterpolationMode.BICUBIC))
    expected = turned[(128 - height) // 2 : (128 + height) // 2, (128 - width) // 2 : (128 + width) // 2]
    crop = crop_turned(image, box, size, angle_deg)
    assert crop.shape == (*size, 3)
    assert np.abs(crop.astype(int) - expected).max() <= 2


def test_corners_of_a_turned_crop_hold_what_lies_around_the_box():
    image = Image.new("RGB", (96, 96), (200, 10, 10))
    assert (crop_turned(image, Box(0, 0, 96, 96), (32, 32), 45.0) == [200, 10, 10]).all()
