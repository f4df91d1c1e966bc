"""Frozen features of images."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

MODES = ("cls", "mean", "both")


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
    """One feature vector for each image, from the last block after the final norm.

    Args:
        backbone: a `DinoVisionTransformer` in eval mode, on the images' device.
        images: [B, 3, H, W] in [0, 1], not normalised.
        mean, std: pixel statistics the backbone was trained with.
        mode: "cls", the class token; "mean", the mean of the patch tokens; "both", the two concatenated.
        half_precision: run the backbone under bfloat16 autocast.

    Returns:
        [B, D] float32, or [B, 2D] for "both".
    """
    if mode not in MODES:
        raise ValueError(f"Unknown feature mode {mode!r}; available: {', '.join(MODES)}")
    mean_pixel, std_pixel = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half_precision):
        tokens = backbone((images - mean_pixel) / std_pixel, is_training=True)
    parts = []
    if mode != "mean":
        parts.append(tokens["x_norm_clstoken"])
    if mode != "cls":
        parts.append(tokens["x_norm_patchtokens"].float().mean(dim=1))
    return torch.cat([part.float() for part in parts], dim=1)


def extract_features(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    mode: str = "cls",
    half_precision: bool = False,
) -> tuple[Tensor, Tensor]:
    """`pooled_features` of whole batches (images, labels); the backbone is in eval mode meanwhile.

    Returns:
        features [N, D or 2D] float32 and labels [N], both on the CPU.

    Raises:
        ValueError: no images, or features that are NaN or infinite.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        found = [
            (
                pooled_features(
                    backbone, images.to(device), mean=mean, std=std, mode=mode, half_precision=half_precision
                ).cpu(),
                labels,
            )
            for images, labels in batches
        ]
    finally:
        backbone.train(was_training)
    if not found:
        raise ValueError("There are no images to compute features of; the dataset, or its chosen part, is empty.")
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    require_finite(features)
    return features, labels


def require_finite(features: Tensor) -> None:
    """Raises ValueError where any image's features, [N, D], are NaN or infinite."""
    num_broken = int((~features.isfinite().all(dim=1)).sum())
    if num_broken:
        raise ValueError(
            f"The features of {num_broken} of {len(features)} images are NaN or infinite: the encoder is broken, "
            "or it was not trained for this pixel range. Take an earlier checkpoint."
        )
