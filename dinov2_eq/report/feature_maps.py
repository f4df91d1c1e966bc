"""Shows patch features of an image and of its rotations as colours."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA

ANGLES_DEG = (0, 30, 90)

# A function that maps images [B, H, W, 3] in uint8 -> patch tokens [B, h, w, D].
PatchFeatures = Callable[[np.ndarray], np.ndarray]


class TurnedMaps(NamedTuple):
    """An image at each of `ANGLES_DEG` and its feature maps, both RGBA in uint8 and transparent outside the disc."""

    images: np.ndarray  # [A, H, W, 4]
    maps: np.ndarray  # [A, h, w, 4]


def turned_maps(images: np.ndarray, patch_features: PatchFeatures) -> list[TurnedMaps]:
    """Maps the first three principal components of the patch tokens to RGB, for images [R, H, W, 3] and rotations.

    Every image is cut to the same disc before rotation, so that no corner leaves the picture and no black wedge
    reveals the angle. A single PCA is fitted to all tokens inside the disc, so that equal colours mean equal features
    in all maps.
    """
    disc = _disc(*images.shape[1:3])  # [H, W]
    grey = np.uint8(images.reshape(-1, 3).mean(axis=0))
    turned = np.stack([[_turn(image, angle) for angle in ANGLES_DEG] for image in images])  # [R, A, H, W, 3]
    turned = np.where(disc[..., None], turned, grey)
    # In float64, because tokens of an untrained backbone may only differ in their last float32 digits.
    tokens = patch_features(turned.reshape(-1, *images.shape[1:])).astype(np.float64)  # [R * A, h, w, D]
    inside = _disc(*tokens.shape[1:3])  # [h, w]
    pca = PCA(n_components=3, svd_solver="full").fit(tokens[:, inside].reshape(-1, tokens.shape[-1]))
    components = pca.transform(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:3], 3)
    low, high = np.percentile(components[:, inside].reshape(-1, 3), [2, 98], axis=0)
    colors = np.uint8(255 * np.clip((components - low) / np.where(high > low, high - low, 1), 0, 1))
    colors = colors.reshape(*turned.shape[:2], *colors.shape[1:])  # [R, A, h, w, 3]
    return [TurnedMaps(*pair) for pair in zip(_with_alpha(turned, disc), _with_alpha(colors, inside), strict=True)]


def _turn(image: np.ndarray, angle_deg: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).rotate(angle_deg, resample=Image.Resampling.BICUBIC))


def _disc(height: int, width: int) -> np.ndarray:
    """Mask [H, W] of the pixels whose centre is inside the inscribed circle."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return y[:, None] ** 2 + x[None, :] ** 2 <= 1


def _with_alpha(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    alpha = np.broadcast_to(np.uint8(255 * mask)[..., None], (*images.shape[:-1], 1))
    return np.concatenate([images, alpha], axis=-1)
