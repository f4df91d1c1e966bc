"""Resizes the parts of a vision transformer that depend on the size of images and patches or the number of channels."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, grid: tuple[int, int], *, antialias: bool, offset: float) -> Tensor:
    """Resizes a position table [1, 1 + M * M, D], class token first, to `grid` = (rows, columns).

    Args:
        antialias: use antialiasing when shrinking.
        offset: added to rows and columns before the scale is computed (0.1 for the published DINOv2 weights without
            registers); 0: resize to the exact size.

    Returns:
        [1, 1 + rows * columns, D]
    """
    side = isqrt(int(table.shape[1]) - 1)  # int: torch.jit.trace makes tensors of sizes
    if grid == (side, side):
        return table
    cls_position, patch_positions = table.float().split([1, side**2], dim=1)
    maps = patch_positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, M, M]
    target = {"scale_factor": tuple((length + offset) / side for length in grid)} if offset else {"size": grid}
    maps = F.interpolate(maps, **target, mode="bicubic", antialias=antialias)
    return torch.cat([cls_position, maps.flatten(2).transpose(1, 2)], dim=1).to(table.dtype)


def resize_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Resizes a patch embedding [D, C, p, p] to [D, C, patch_size, patch_size].

    For an enlarged patch, the new kernel gives the same result as the old one for the original patch: with the matrix R
    of the enlargement, <R x, new> = <x, old> for every patch x, so new = pinv(R^T) old (FlexiViT, arXiv 2212.08013,
    section 3.4). For smaller patches this is only possible approximately, and new is the best fit for white noise.
    """
    old_size = kernel.shape[-1]
    if patch_size == old_size:
        return kernel
    unit_patches = torch.eye(old_size**2, dtype=torch.float64).unflatten(1, (1, old_size, old_size))
    enlarged = F.interpolate(unit_patches, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(enlarged.flatten(1)).to(kernel.device)  # of R^T, [p' p', p p]
    return (kernel.double().flatten(2) @ inverse.T).unflatten(2, (patch_size, patch_size)).to(kernel.dtype)


def resize_channels(kernel: Tensor, channels: int) -> Tensor:
    """Changes the number of input channels of a patch embedding [D, C, p, p] to [D, channels, p, p].

    A single channel gets the sum of all, so that a grey image gives the same tokens as its copies in every channel.
    More channels repeat the old ones, scaled so that tokens keep their magnitude.
    """
    old = kernel.shape[1]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(channels) % old] * (old / channels)
