"""Random resized crops from an explicit generator, and mirrored borders around an image."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

RATIO_MIN_MAX = (3 / 4, 4 / 3)
NUM_TRIES = 10


class Box(NamedTuple):
    """A rectangle in pixels of the image; it may extend beyond the image."""

    left: float
    top: float
    width: float
    height: float

    def enlarged(self, factor_width: float, factor_height: float) -> "Box":
        """Scales the box by the given factors, keeping its centre."""
        width, height = self.width * factor_width, self.height * factor_height
        return Box(self.left - (width - self.width) / 2, self.top - (height - self.height) / 2, width, height)


def draw_crop_box(size: tuple[int, int], scale: Sequence[float], generator: torch.Generator) -> Box:
    """Draws a box as torchvision's RandomResizedCrop does: the same numbers in the same order, but from `generator`.

    Args:
        size: (width, height) of the image.
        scale: smallest and largest share of the image's area.
    """
    width, height = size
    log_ratio = torch.log(torch.tensor(RATIO_MIN_MAX))
    for _ in range(NUM_TRIES):
        area = width * height * torch.empty(1).uniform_(scale[0], scale[1], generator=generator).item()
        ratio = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1], generator=generator)).item()
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = torch.randint(0, height - crop_height + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - crop_width + 1, (1,), generator=generator).item()
            return Box(left, top, crop_width, crop_height)

    # No box fits, because the image is too narrow or too small: take the largest central one.
    crop_width = min(width, max(1, round(height * RATIO_MIN_MAX[1])))
    crop_height = min(height, max(1, round(width / RATIO_MIN_MAX[0])))
    return Box((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height)


def crop_resized(image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Resizes the box to `size` = (H, W) with one bicubic, antialiased resampling; returns [H, W, 3] uint8.

    Outside the image, the pixels are mirrored at its border.
    """
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    if edges[0] < 0 or edges[1] < 0 or edges[2] > image.width or edges[3] > image.height:
        image, (shift_x, shift_y) = _mirrored(image, edges)
        edges = (edges[0] + shift_x, edges[1] + shift_y, edges[2] + shift_x, edges[3] + shift_y)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges))


def crop_turned(image: Image.Image, box: Box, size: tuple[int, int], angle_deg: float) -> np.ndarray:
    """Turns the content of the box counter-clockwise about its centre, and resizes it to `size` = (H, W).

    The corners are filled with what lies around the box. Returns [H, W, 3] uint8; an angle of 0 is `crop_resized`.
    """
    if angle_deg == 0:
        return crop_resized(image, box, size)
    (height, width), angle = size, math.radians(angle_deg)
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    # Margins that hold the turned rectangle and the reach of the bicubic kernel, the same on both sides of the centre.
    margin_y = max(math.ceil((height * cosine + width * sine - height) / 2), 0) + 2
    margin_x = max(math.ceil((width * cosine + height * sine - width) / 2), 0) + 2
    outer = (height + 2 * margin_y, width + 2 * margin_x)
    around = crop_resized(image, box.enlarged(outer[1] / width, outer[0] / height), outer)
    turned = Image.fromarray(around).rotate(angle_deg, Image.Resampling.BICUBIC)
    return np.asarray(turned)[margin_y : margin_y + height, margin_x : margin_x + width]


def _mirrored(image: Image.Image, edges: tuple[float, float, float, float]) -> tuple[Image.Image, tuple[int, int]]:
    """Crops the image to `edges` (left, top, right, bottom), and mirrors it where they lie outside.

    Returns:
        the padded part, and the shift (x, y) from coordinates of the image to coordinates of the part.
    """
    left, top, right, bottom = (math.floor(edges[0]), math.floor(edges[1]), math.ceil(edges[2]), math.ceil(edges[3]))
    inside = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    padding = (
        (max(-top, 0), max(bottom - image.height, 0)),
        (max(-left, 0), max(right - image.width, 0)),
        (0, 0),
    )
    return Image.fromarray(np.pad(np.asarray(inside), padding, mode="reflect")), (-left, -top)
