"""From an image to its views: `MultiCrop` in the workers, `make_views` on the device.

A worker decodes and crops; it draws every random number of a sample, but hands pixels over as uint8. The device
does what is cheap there: photometric operations, transforms and normalisation, each on the whole batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_eq.data.crops import crop_resized, draw_crop_box
from dinov2_eq.data.photometric import apply_photometric
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.types import CollatedBatch, PhotometricParams, Sample, ViewBatch

BLUR_SIGMA_MIN_MAX = (0.1, 2.0)
BORDERS = ("zeros", "canvas")


class MultiCrop:
    """Two global crops, the second on a canvas, and the local crops of one image (DINOv2's multi-crop).

    Every random number comes from the generator, in an order in which `transform` and `border` come last: crops and
    augmentation are the same whatever the transform, and without one.

    Args:
        jitter: largest change of brightness, contrast, saturation (as a share) and hue (in turns).
        blur_prob: of global crop 1, global crop 2 and the local crops.
        solarize_prob: of global crop 2.
        transform: g, which will be applied to the base view; None: there is none.
        border: "canvas": the base view comes with those pixels around it that the transform can bring in, mirrored
            beyond the image; "zeros": without.

    Raises:
        ValueError: unknown `border`.
    """

    def __init__(
        self,
        *,
        global_crops_size: int,
        global_crops_scale: Sequence[float],
        local_crops_size: int,
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        horizontal_flip: float,
        jitter_prob: float,
        jitter: Sequence[float],
        grey_prob: float,
        blur_prob: Sequence[float],
        solarize_prob: float,
        transform: Transform | None,
        border: str,
    ) -> None:
        if border not in BORDERS:
            raise ValueError(f"equivariance.border={border!r} is unknown; known are {', '.join(BORDERS)}.")
        self.horizontal_flip = horizontal_flip
        self.jitter_prob = jitter_prob
        self.jitter = torch.tensor(list(jitter))
        self.grey_prob = grey_prob
        self.transform = transform

        # One entry for each view: anchor, base, local crops.
        num_views = 2 + local_crops_number
        self.scales = [global_crops_scale] * 2 + [local_crops_scale] * local_crops_number
        self.local_size = (local_crops_size, local_crops_size)
        self.sizes = [(global_crops_size, global_crops_size)] * 2 + [self.local_size] * local_crops_number
        self.blur_prob = torch.tensor([blur_prob[min(view, 2)] for view in range(num_views)])
        self.solarize_prob = torch.zeros(num_views)
        self.solarize_prob[1] = solarize_prob
        self.canvas_size = self.sizes[1]
        if transform is not None and border == "canvas":
            self.canvas_size = transform.canvas_size(self.sizes[1])

    def __call__(
        self, image: Image.Image, generator: torch.Generator, *, position: int = 0, skipped: tuple[str, ...] = ()
    ) -> Sample:
        """Crops one RGB image; `position` and `skipped` go into the `Sample` as they are."""
        num_views = len(self.sizes)
        boxes = [draw_crop_box(image.size, scale, generator) for scale in self.scales]
        flips = (torch.rand(num_views, generator=generator) < self.horizontal_flip).tolist()
        photometric = self._draw_photometric(generator)
        theta = torch.zeros(0) if self.transform is None else self.transform.sample(1, generator)[0]

        sizes = list(self.sizes)
        factors = [canvas / side for canvas, side in zip(self.canvas_size, sizes[1], strict=True)]
        boxes[1], sizes[1] = boxes[1].enlarged(factors[1], factors[0]), self.canvas_size
        crops = []
        for box, flip, size in zip(boxes, flips, sizes, strict=True):
            pixels = crop_resized(image, box, size)  # [H, W, 3]
            pixels = pixels[:, ::-1] if flip else pixels
            crops.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        anchor_crop, base_canvas, *local_crops = crops
        no_crops = torch.zeros(0, 3, *self.local_size, dtype=torch.uint8)
        stacked = torch.stack(local_crops) if local_crops else no_crops
        return Sample(position, anchor_crop, base_canvas, stacked, photometric, theta, skipped)

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
    transform: Transform | None,
    num_intermediates: int,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> ViewBatch:
    """Augments, transforms and normalises a batch on the device that it lies on (`loaders.to_device`).

    With a transform g and the base view u, the second global crop is v2 = g_theta(u), and intermediate target k is
    g at k / (K + 1) of theta on u, k = 1 .. K; each is one resampling of u (arXiv 2503.18753, section 3).

    Args:
        transform: g; None: the second global crop is u itself.
        num_intermediates: K; 0: no targets.
        size: (H, W) of the global crops.
        mean, std: of the pixels in [0, 1], for each channel.

    Returns:
        Float32 views; `intermediate_targets` is [0, B, C, H, W] where there are none.
    """
    num_local, batch_size = batch.local_crops.shape[:2]
    anchor_params, base_params, local_params = _split_views(batch.photometric)
    anchor = apply_photometric(_to_float(batch.anchor_crops), anchor_params)
    base = apply_photometric(_to_float(batch.base_canvases), base_params)  # [B, C, Hc, Wc]
    local_crops = apply_photometric(_to_float(batch.local_crops.flatten(0, 1)), local_params)

    if transform is None:
        path = base[None]
    else:
        num_images = num_intermediates + 1
        thetas = [transform.scaled(batch.theta, step / num_images) for step in range(1, num_images)] + [batch.theta]
        canvases = base.expand(num_images, *base.shape).flatten(0, 1)  # [(K + 1) B, C, Hc, Wc]
        path = transform.apply(canvases, torch.cat(thetas), size).unflatten(0, (num_images, batch_size))

    pixel_mean = torch.tensor(list(mean), device=base.device)[:, None, None]
    pixel_std = torch.tensor(list(std), device=base.device)[:, None, None]
    path = (path - pixel_mean) / pixel_std  # [K + 1, B, C, H, W]: the targets, then v2
    anchor = (anchor - pixel_mean) / pixel_std
    return ViewBatch(
        global_crops=torch.stack([anchor, path[-1]]),
        local_crops=((local_crops - pixel_mean) / pixel_std).unflatten(0, (num_local, batch_size)),
        masks=batch.masks,
        intermediate_targets=path[:-1],
    )


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 255


def _split_views(params: PhotometricParams) -> tuple[PhotometricParams, PhotometricParams, PhotometricParams]:
    """[2 + L, B] -> anchor [B], base [B], local crops [L * B]"""
    return (
        PhotometricParams(*(values[0] for values in params)),
        PhotometricParams(*(values[1] for values in params)),
        PhotometricParams(*(values[2:].flatten(0, 1) for values in params)),
    )
