"""Photometric operations with one parameter for each image of a batch, on any device.

All take images [B, 3, H, W] in [0, 1] and parameters [B], and equal torchvision's functional operations image by image.
"""

import math

import kornia
import torch
from torch import Tensor


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor * image, clipped to [0, 1]; factor 1 is the identity."""
    return kornia.enhance.adjust_brightness_accumulative(images, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean grey value; factor 1 is the identity, 0 a flat grey."""
    return kornia.enhance.adjust_contrast_with_mean_subtraction(images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the grey image; factor 1 is the identity, 0 the grey image."""
    return kornia.enhance.adjust_saturation_with_gray_subtraction(images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue circle by `shift` turns, in [-0.5, 0.5]; 0 is the identity up to rounding."""
    return kornia.enhance.adjust_hue(images, shift * (2 * math.pi))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int = 9) -> Tensor:
    """Gaussian blur with `sigma` in pixels, cut off at `kernel_size` pixels (DINOv2's 9); 0 is the identity.

    The border is mirrored; images too small to be mirrored repeat their border pixels.
    """
    border = "reflect" if min(images.shape[-2:]) > kernel_size // 2 else "replicate"
    # Below this sigma all weights but the central one vanish in float32.
    sigma = sigma.clamp(min=0.01)
    return kornia.filters.gaussian_blur2d(images, kernel_size, torch.stack([sigma, sigma], dim=1), border)


def to_grey(images: Tensor) -> Tensor:
    """Luma (0.299, 0.587, 0.114), repeated over the three channels."""
    return kornia.color.rgb_to_grayscale(images).expand_as(images)
