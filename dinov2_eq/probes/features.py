"""Computes frozen features of images."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.distributed import gather_rows, get_rank, get_world_size

# What each mode is made of, with its width in tokens.
MODES = {"cls": ("cls",), "mean": ("mean",), "both": ("cls", "mean"), "grid2": ("grid2",)}
EQUIVARIANT_MODES = {"equi": "mean", "equi_grid2": "grid2"}  # a linear map, so it may follow the pooling
WIDTHS = {"cls": 1, "mean": 1, "grid2": 4}


@torch.no_grad()  # inference mode would leave sharded backbones with tensors that training cannot use
def pooled_features(
    backbone: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "cls",
    half_precision: bool = False,
) -> Tensor:
    """Computes one feature vector per image, from the last block after the final norm.

    Args:
        backbone: a `DinoVisionTransformer` in eval mode, on the images' device.
        images: [B, 3, H, W] in [0, 1], not normalised.
        mean, std: pixel statistics that the backbone was trained with.
        mode: "cls", the class token; "mean", the mean of the patch tokens; "both", the two concatenated; "grid2", the
            means of the patch tokens in each quarter of a square image, row by row.
        half_precision: run the backbone under bfloat16 autocast.

    Returns:
        [B, D] float32, [B, 2D] for "both", or [B, 4D] for "grid2".
    """
    if mode not in MODES:
        raise ValueError(f"Unknown feature mode {mode!r}; available: {', '.join(MODES)}")
    parts = pooled_parts(backbone, images, MODES[mode], mean=mean, std=std, half_precision=half_precision)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def pooled_parts(
    backbone: nn.Module,
    images: Tensor,
    parts: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    half_precision: bool = False,
) -> list[Tensor]:
    """Computes some of the keys of `WIDTHS` in one forward, each [B, width * D] float32; see `pooled_features`."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half_precision):
        tokens = backbone(_normalized(images, mean, std), is_training=True)
    patches = tokens["x_norm_patchtokens"]
    pooled = {
        "cls": lambda: tokens["x_norm_clstoken"].float(),
        "mean": lambda: patches.float().mean(dim=1),
        "grid2": lambda: _quarters(patches.float()),
    }
    return [pooled[part]() for part in parts]


def _quarters(patches: Tensor) -> Tensor:
    """Averages patch tokens [B, N, D] of square images over their quarters: [B, 4D]."""
    side = math.isqrt(patches.shape[1])
    maps = patches.transpose(1, 2).unflatten(2, (side, side))  # [B, D, h, w]
    return F.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2).flatten(1)


@torch.no_grad()
def block_features(
    backbone: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_blocks: int,
    half_precision: bool = False,
) -> Tensor:
    """Computes the input of DINOv2's linear heads, after the final norm.

    Args:
        num_blocks: n, at least 1; the other arguments are those of `pooled_features`.

    Returns:
        [B, (n + 1) * D] float32: the class tokens of the last n blocks, in order of depth, then the mean of the patch
        tokens of the last block.

    Raises:
        ValueError: the backbone has fewer than n blocks, or they differ in width, as the stages of a ResNet do.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half_precision):
        blocks = backbone.get_intermediate_layers(_normalized(images, mean, std), num_blocks, return_class_token=True)
    widths = [cls_token.shape[1] for _, cls_token in blocks]
    if len(set(widths)) > 1:
        raise ValueError(
            f"its last {num_blocks} stages have different widths, {widths}, so that heads cannot share them"
        )
    parts = [cls_token for _, cls_token in blocks] + [blocks[-1][0].float().mean(dim=1)]
    return torch.cat([part.float() for part in parts], dim=1)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean_pixel, std_pixel = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images - mean_pixel) / std_pixel


def encode_batches(encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Encodes batches of images; returns features [N, D] on the CPU.

    Args:
        encode: [B, 3, H, W] in [0, 1] on `device` -> [B, D].
        batches: images [B, 3, H, W] in a form that `to_unit_range` accepts.

    Raises:
        ValueError: no images.
    """
    features = [encode(to_unit_range(images, device)).cpu() for images in batches]
    if not features:
        raise ValueError("There are no images to compute features of: the dataset, or the chosen part of it, is empty.")
    return torch.cat(features)


def to_unit_range(images: Tensor, device: torch.device) -> Tensor:
    """Moves images to `device` as floats in [0, 1]; uint8 is divided by 255 there."""
    images = images.to(device, non_blocking=True)
    return images if images.is_floating_point() else images.float() / 255


def encode_together(
    encode: Callable[[Tensor], Tensor],
    make_batches: Callable[[np.ndarray], Iterable[Tensor]],
    indices: np.ndarray,
    device: torch.device,
    *,
    gather: bool = True,
) -> Tensor:
    """Encodes many images on all processes, each of which encodes the same number; see `encode_batches`.

    Args:
        make_batches: maps indices to batches of their images, in order.
        indices: [N] of the images, the same in all processes.
        gather: return the features of all images, in the order of `indices`, to every process; otherwise each gets
            those of its own share, see `own_share`.

    Raises:
        ValueError: no images, or features that are NaN or infinite.
    """
    num_images = len(indices)
    own = encode_batches(encode, make_batches(indices[even_share(num_images)]), device)
    features = gather_rows(own)[:num_images] if gather else own[: len(indices[own_share(num_images)])]
    require_finite(features)
    return features


def even_share(num_images: int) -> np.ndarray:
    """Returns the places [share] of this process's images, as many in each: the last ones begin anew with the first."""
    share = -(-num_images // get_world_size())
    return np.resize(np.arange(num_images), (get_world_size(), share))[get_rank()]


def own_share(num_images: int) -> slice:
    """The part of `num_images` images that this process handles; the last processes may have fewer, or none."""
    share = -(-num_images // get_world_size())
    return slice(get_rank() * share, (get_rank() + 1) * share)


def require_finite(features: Tensor) -> None:
    """Raises ValueError if the features [N, D] of any image are NaN or infinite."""
    num_broken = int((~features.isfinite().all(dim=1)).sum())
    if num_broken:
        raise ValueError(
            f"The features of {num_broken} of {len(features)} images are NaN or infinite: the encoder is broken, "
            "or it was not trained for this pixel range. Use an earlier checkpoint."
        )
