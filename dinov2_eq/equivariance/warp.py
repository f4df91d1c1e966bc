"""Planar motions of images: rotate about the centre, then shift, in one resampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def warp_se2(images: Tensor, angle_deg: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """Rotates images about their centre, then shifts them; the result is the centre of `size` of the moved image.

    Args:
        images: [B, C, Hc, Wc], any floating dtype. A canvas larger than `size` supplies the pixels that come in at the
            border; what lies outside it is black (0).
        angle_deg: [B] degrees, positive counter-clockwise as in torchvision's `rotate`.
        shift: [B, 2] shares of the width (positive right) and of the height (positive down) of `size`.
        size: (H, W) of the result.

    Returns:
        [B, C, H, W] in the dtype of `images`, bilinear, sampled in float32 or better.
    """
    height, width = size
    precise = torch.promote_types(images.dtype, torch.float32)
    angle = torch.deg2rad(angle_deg.to(precise))[:, None, None]
    pixels = torch.tensor([width, height], dtype=precise, device=images.device)
    shift_px = shift.to(precise) * pixels  # [B, 2]

    # Offsets from the centre of every output pixel, then back through the shift and the rotation.
    columns = torch.arange(width, dtype=precise, device=images.device) - (width - 1) / 2
    rows = torch.arange(height, dtype=precise, device=images.device) - (height - 1) / 2
    x = columns[None, None, :] - shift_px[:, 0, None, None]
    y = rows[None, :, None] - shift_px[:, 1, None, None]
    source_x = angle.cos() * x - angle.sin() * y  # [B, H, W]
    source_y = angle.sin() * x + angle.cos() * y

    half_height, half_width = images.shape[-2] / 2, images.shape[-1] / 2
    grid = torch.stack([source_x / half_width, source_y / half_height], dim=-1)  # [B, H, W, 2]
    warped = F.grid_sample(images.to(precise), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.to(images.dtype)


def se2_canvas_size(size: tuple[int, int], max_angle_deg: float, max_shift: float) -> tuple[int, int]:
    """Computes the smallest canvas that contains every pixel `warp_se2` can sample in these ranges.

    It exceeds `size` (H, W) by an even number of pixels, so that the centre of the canvas falls on whole pixels and the
    identity needs no interpolation.
    """
    height, width = (side * (1 + 2 * max_shift) for side in size)

    def extent(along: float, across: float) -> float:
        # along * cos(a) + across * sin(a) grows up to a = atan(across / along)
        angle = min(math.radians(max_angle_deg), math.atan2(across, along))
        return along * math.cos(angle) + across * math.sin(angle)

    needed = (extent(height, width), extent(width, height))
    margins = (math.ceil((length - side) / 2 - 1e-9) for length, side in zip(needed, size, strict=True))
    height, width = (side + 2 * max(margin, 0) for side, margin in zip(size, margins, strict=True))
    return height, width
