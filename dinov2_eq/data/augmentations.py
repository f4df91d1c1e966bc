"""From an image to its views: `MultiCrop` in the workers, `make_views` on the device.

A worker decodes and crops; it draws every random number of a sample, but hands pixels over as uint8. The device
does what is cheap there: photometric operations, transforms and normalisation, each on the whole batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov2_eq.data.crops import crop_turned, draw_crop_box
from dinov2_eq.data.photometric import apply_photometric
from dinov2_eq.equivariance.pairing import Pairing
from dinov2_eq.settings import CropsConfig
from dinov2_eq.types import (
    GLOBAL,
    LOCAL,
    PATH,
    CollatedBatch,
    Group,
    ImagePair,
    PathViews,
    PhotometricParams,
    Sample,
    ViewBatch,
)

BLUR_SIGMA_MIN_MAX = (0.1, 2.0)


class MultiCrop:
    """Two global crops, the second on a canvas, and the local crops of one image (DINOv2's multi-crop).

    Every random number comes from the generator. The pairing draws last, so crops and augmentations do not depend on
    it.

    Args:
        crops: sizes, scales and augmentation.
        pairing: says how large the canvas is, and draws what links the second view to the first.
        num_local: local crops of each image.

    Raises:
        ValueError: the images come in pairs, and some would be mirrored or turned.
    """

    def __init__(self, crops: CropsConfig, pairing: Pairing, num_local: int) -> None:
        for key, change in (("horizontal_flip", "mirrors"), ("max_rotation_deg", "turns")):
            if pairing.reads_pairs and getattr(crops, key) > 0:
                raise ValueError(
                    f"crops.{key}={getattr(crops, key)} {change} images of a pair, so that theta no longer leads from "
                    "one to the other; set it to 0"
                )
        self.horizontal_flip = crops.horizontal_flip
        self.max_rotation_deg = crops.max_rotation_deg
        self.jitter_prob = crops.jitter_prob
        self.jitter = torch.tensor(list(crops.jitter))
        self.grey_prob = crops.grey_prob
        self.pairing = pairing

        # One entry for each view: anchor, base, local crops.
        num_views = 2 + num_local
        self.scales = [crops.global_crops_scale] * 2 + [crops.local_crops_scale] * num_local
        self.local_size = (crops.local_crops_size, crops.local_crops_size)
        self.sizes = [(crops.global_crops_size, crops.global_crops_size)] * 2 + [self.local_size] * num_local
        self.blur_prob = torch.tensor([crops.blur_prob[min(view, 2)] for view in range(num_views)])
        self.solarize_prob = torch.zeros(num_views)
        self.solarize_prob[1] = crops.solarize_prob
        self.canvas_size = pairing.canvas_size(self.sizes[1])

    def __call__(
        self,
        item: Image.Image | ImagePair,
        generator: torch.Generator,
        *,
        position: int = 0,
        skipped: tuple[str, ...] = (),
    ) -> Sample:
        """Crops one RGB image, or a pair of them; `position` and `skipped` go into the `Sample` as they are."""
        num_views = len(self.sizes)
        pair = item if isinstance(item, ImagePair) else None
        first, second = (pair.first, pair.second) if pair else (item, item)
        images = [first, second, *[first] * (num_views - 2)]
        boxes = [draw_crop_box(image.size, scale, generator) for image, scale in zip(images, self.scales, strict=True)]
        flips = (torch.rand(num_views, generator=generator) < self.horizontal_flip).tolist()
        photometric = self._draw_photometric(generator)
        angles = [0.0] * num_views
        if self.max_rotation_deg > 0:
            angles = (self.max_rotation_deg * (2 * torch.rand(num_views, generator=generator) - 1)).tolist()
        drawn = self.pairing.draw(pair, generator)

        sizes = list(self.sizes)
        factors = [canvas / side for canvas, side in zip(self.canvas_size, sizes[1], strict=True)]
        boxes[1], sizes[1] = boxes[1].enlarged(factors[1], factors[0]), self.canvas_size
        crops = []
        for image, box, angle, flip, size in zip(images, boxes, angles, flips, sizes, strict=True):
            pixels = crop_turned(image, box, size, angle)  # [H, W, 3]
            pixels = pixels[:, ::-1] if flip else pixels
            crops.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        anchor_crop, base_canvas, *local_crops = crops
        no_crops = torch.zeros(0, 3, *self.local_size, dtype=torch.uint8)
        stacked = torch.stack(local_crops) if local_crops else no_crops
        return Sample(position, anchor_crop, base_canvas, stacked, photometric, drawn, skipped)

    def _draw_photometric(self, generator: torch.Generator) -> PhotometricParams:
        """Parameters [V] of all views. The same count of numbers is drawn whatever the probabilities are."""
        num_views = len(self.sizes)
        chance = torch.rand(4, num_views, generator=generator)  # of jitter, grey, blur, solarize
        change = (2 * torch.rand(num_views, 4, generator=generator) - 1) * self.jitter  # [V, 4] in [-jitter, jitter]
        order = torch.rand(num_views, 4, generator=generator).argsort(dim=1)
        sigma = torch.empty(num_views).uniform_(*BLUR_SIGMA_MIN_MAX, generator=generator)

        change = torch.where((chance[0] < self.jitter_prob)[:, None], change, 0.0)
        factor = (1 + change[:, :3]).clamp(min=0)
        return PhotometricParams(
            brightness=factor[:, 0],
            contrast=factor[:, 1],
            saturation=factor[:, 2],
            hue=change[:, 3],
            order=order,
            grey=chance[1] < self.grey_prob,
            blur_sigma=torch.where(chance[2] < self.blur_prob, sigma, 0.0),
            solarize=chance[3] < self.solarize_prob,
        )


@torch.no_grad()
def make_views(
    batch: CollatedBatch,
    *,
    crops: CropsConfig,
    pairing: Pairing,
    targets: Sequence[float] = (),
    path: PathViews | None = None,
) -> ViewBatch:
    """Augments, transforms and normalises a batch on the device that it lies on (`loaders.to_device`).

    Args:
        crops: sizes and pixel statistics.
        pairing: makes the second global view, the targets and the path from the base view u.
        targets: fractions of theta at which objectives compare pixels.
        path: views to encode for one objective alone.

    Returns:
        Float32 views.
    """
    size, num_local = (crops.global_crops_size,) * 2, len(batch.local_crops)
    anchor_params, base_params, local_params = _split_views(batch.photometric)
    anchor = apply_photometric(_to_float(batch.anchor_crops), anchor_params)
    base = apply_photometric(_to_float(batch.base_canvases), base_params)  # [B, C, Hc, Wc]
    # Without a path the targets are made along with the second view, in one resampling.
    along = targets if path is None else ()
    second = pairing.path(base, batch.theta, [*along, pairing.second], size)  # [F + 1, B, C, H, W]

    mean = torch.tensor(list(crops.mean), device=base.device)[:, None, None]
    std = torch.tensor(list(crops.std), device=base.device)[:, None, None]
    second = (second - mean) / std
    rebuilt = second[:-1]
    masks = batch.masks if batch.masks.shape[-1] else None
    groups = {GLOBAL: Group(torch.stack([(anchor - mean) / std, second[-1]]), masks, batch.masked_patches)}
    if num_local:
        local_crops = apply_photometric(_to_float(batch.local_crops.flatten(0, 1)), local_params)
        groups[LOCAL] = Group(((local_crops - mean) / std).unflatten(0, (num_local, -1)))
    if path is not None:
        rows = batch.path_rows
        views = pairing.path(base[rows], batch.theta[rows], [*targets, *path.fractions], size)  # [F, R, C, H, W]
        if path.local_size:
            small = F.interpolate(views.flatten(0, 1), (crops.local_crops_size,) * 2, mode="bilinear", antialias=True)
            views = small.unflatten(0, views.shape[:2])
        views = (views - mean) / std
        rebuilt, groups[PATH] = views[: len(targets)], Group(views[len(targets) :])
    return ViewBatch(groups, batch.theta, batch.known, rebuilt, batch.path_rows)


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255


def _split_views(params: PhotometricParams) -> tuple[PhotometricParams, PhotometricParams, PhotometricParams]:
    """[2 + L, B] -> anchor [B], base [B], local crops [L * B]"""
    return (
        PhotometricParams(*(values[0] for values in params)),
        PhotometricParams(*(values[1] for values in params)),
        PhotometricParams(*(values[2:].flatten(0, 1) for values in params)),
    )
