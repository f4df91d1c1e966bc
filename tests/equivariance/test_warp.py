"""Rotation and shift of images: against torchvision, and by their properties."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from dinov2_eq.equivariance.warp import se2_canvas_size, warp_se2

SIZES = [(32, 32), (24, 40)]


def images(size, batch=3, dtype=torch.float64):
    return torch.rand(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_zero_is_the_identity(size):
    image = images(size)
    torch.testing.assert_close(warp_se2(image, torch.zeros(3), torch.zeros(3, 2), size), image)


@pytest.mark.parametrize("size", SIZES)
def test_rotation_equals_torchvision(size):
    image = images(size, dtype=torch.float32)
    angles = torch.tensor([-37.0, 12.5, 45.0])
    ours = warp_se2(image, angles, torch.zeros(3, 2), size)
    theirs = torch.stack(
        [tvf.rotate(one, angle, InterpolationMode.BILINEAR) for one, angle in zip(image, angles.tolist(), strict=True)]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_shift_equals_torchvision(size):
    image = images(size, dtype=torch.float32)
    height, width = size
    ours = warp_se2(image[:1], torch.zeros(1), torch.tensor([[3 / width, -2 / height]]), size)
    theirs = tvf.affine(
        image[:1], angle=0, translate=[3, -2], scale=1, shear=[0], interpolation=InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_rotation_comes_before_the_shift():
    image, size = images((32, 32)), (32, 32)
    angle, shift = torch.full((3,), 90.0), torch.tensor([[0.25, 0.125]]).expand(3, 2)
    turned = warp_se2(image, angle, torch.zeros(3, 2), size)
    moved = warp_se2(turned, torch.zeros(3), shift, size)
    torch.testing.assert_close(warp_se2(image, angle, shift, size), moved)


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back_returns_the_interior(size):
    rows, columns = torch.meshgrid(*(torch.linspace(0, 3, side, dtype=torch.float64) for side in size), indexing="ij")
    smooth = (rows.sin() * columns.cos())[None, None]
    angle = torch.tensor([20.0])
    back = warp_se2(warp_se2(smooth, angle, torch.zeros(1, 2), size), -angle, torch.zeros(1, 2), size)
    inner = (..., slice(9, -9), slice(9, -9))
    torch.testing.assert_close(back[inner], smooth[inner], atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, (33, 20)])
@pytest.mark.parametrize(("max_angle", "max_shift"), [(45, 0.0), (0, 0.1), (45, 10 / 224), (30, 0.2), (180, 0.05)])
def test_a_canvas_leaves_no_border(size, max_angle, max_shift):
    canvas = se2_canvas_size(size, max_angle, max_shift)
    assert all((larger - side) % 2 == 0 for larger, side in zip(canvas, size, strict=True))
    corners = torch.cartesian_prod(torch.linspace(-1, 1, 9), *[torch.tensor([-1.0, 1.0])] * 2)
    white = torch.ones(len(corners), 1, *canvas, dtype=torch.float64)
    moved = warp_se2(white, corners[:, 0] * max_angle, corners[:, 1:] * max_shift, size)
    torch.testing.assert_close(moved, torch.ones_like(moved))


def test_without_a_canvas_black_comes_in():
    moved = warp_se2(torch.ones(1, 1, 32, 32), torch.tensor([45.0]), torch.zeros(1, 2), (32, 32))
    assert moved[0, 0, 0, 0] == 0


def test_the_centre_of_a_canvas_is_not_interpolated():
    canvas = images((46, 50))
    still = warp_se2(canvas, torch.zeros(3), torch.zeros(3, 2), (32, 36))
    torch.testing.assert_close(still, canvas[..., 7:-7, 7:-7])


def test_half_precision_follows_single():
    image = images((32, 32), dtype=torch.float32)
    angle, shift = torch.tensor([10.0, -30.0, 45.0]), torch.full((3, 2), 0.1)
    half = warp_se2(image.bfloat16(), angle, shift, (32, 32))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), warp_se2(image, angle, shift, (32, 32)), atol=0.01, rtol=0)


def test_gradients():
    image = images((6, 8), batch=2).requires_grad_()
    angle = torch.tensor([13.0, -7.0], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([[0.05, 0.02], [0.11, -0.07]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: warp_se2(*inputs, (6, 8)), (image, angle, shift))
