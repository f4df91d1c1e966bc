"""The photometric augmentation of DINOv2, batched: jitter, grey, blur, solarize, with one draw for each image."""

import torch
from torch import Tensor

from dinov2_eq.equivariance.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    to_grey,
)
from dinov2_eq.types import PhotometricParams

SOLARIZE_THRESHOLD = 128 / 255


def apply_photometric(images: Tensor, params: PhotometricParams) -> Tensor:
    """Augments each image with its own parameters; images with identity parameters stay bit for bit as they are.

    Args:
        images: [B, 3, H, W] in [0, 1], any device.
        params: leading axis B. On the CPU, also for images on a GPU: which images an operation concerns is decided
            there, so that the GPU is never waited for.

    Returns:
        [B, 3, H, W] in [0, 1]
    """
    images = images.clone()
    jitter = (  # in the order that `params.order` counts
        (adjust_brightness, params.brightness, params.brightness != 1),
        (adjust_contrast, params.contrast, params.contrast != 1),
        (adjust_saturation, params.saturation, params.saturation != 1),
        (adjust_hue, params.hue, params.hue != 0),
    )
    for place in range(len(jitter)):
        for number, (adjust, values, concerned) in enumerate(jitter):
            rows = _rows(concerned & (params.order[:, place] == number))
            if len(rows):
                _replace(images, rows, adjust, values[rows])
    if len(rows := _rows(params.grey)):
        _replace(images, rows, to_grey)
    if len(rows := _rows(params.blur_sigma > 0)):
        _replace(images, rows, gaussian_blur, params.blur_sigma[rows])
    if len(rows := _rows(params.solarize)):
        _replace(images, rows, _solarize)
    return images


def _rows(concerned: Tensor) -> Tensor:
    return concerned.nonzero().flatten()


def _replace(images: Tensor, rows: Tensor, operation, *values: Tensor) -> None:
    """Applies an operation to some rows of a batch, in place."""
    rows = rows.to(images.device, non_blocking=True)
    arguments = [value.to(images.device, images.dtype, non_blocking=True) for value in values]
    images[rows] = operation(images[rows], *arguments)


def _solarize(images: Tensor) -> Tensor:
    return torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images)
