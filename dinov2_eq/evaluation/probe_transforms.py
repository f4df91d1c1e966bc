"""The training transforms, plus crop and flip, which have no intermediate views."""

import difflib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.equivariance.transforms import TRANSFORMS, Transform, build_transform


class Crop(Transform):
    """Crop of a square part of the image, resized to the whole.

    Its side is exp(log_scale) times the image's, with log_scale uniform up to 0. Its centre is uniform among the places
    where the crop fits, as an offset from the image's centre in shares of the image's side.

    Args:
        min_share: smallest share of the area to keep, in (0, 1].

    Raises:
        ValueError: `min_share` is outside (0, 1].
    """

    components = ("centre_x", "centre_y", "log_scale")

    def __init__(self, min_share: float) -> None:
        if not 0 < min_share <= 1:
            raise ValueError(f"A crop must keep a share of the image in (0, 1], got {min_share}")
        smallest = math.sqrt(min_share)
        room = (1 - smallest) / 2
        super().__init__(low=[-room, -room, math.log(smallest)], high=[room, room, 0.0])

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        theta = super().sample(batch, generator)
        room = (1 - theta[:, 2:].exp()) / 2  # [batch, 1]
        return torch.cat([theta[:, :2] / self.high[:2].to(theta) * room, theta[:, 2:]], dim=1)

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        side, none = theta[:, 2].exp(), theta.new_zeros(len(theta))
        rows = [torch.stack([side, none, 2 * theta[:, 0]], dim=1), torch.stack([none, side, 2 * theta[:, 1]], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1), [*images.shape[:2], *size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Flip(Transform):
    """Horizontal flip with probability 1/2."""

    components = ("mirrored",)

    def __init__(self) -> None:
        super().__init__(low=[0.0], high=[1.0])

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        return super().sample(batch, generator).round()

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.where(theta[:, :1, None, None] > 0.5, images.flip(-1), images)


def build_probe_transform(name: str, *, min_crop_share: float, **ranges) -> Transform:
    """Builds the transform called `name`: crop, flip, or one of `build_transform`.

    Raises:
        ValueError: no transform of that name, or its module cannot be imported.
    """
    if name == "crop":
        return Crop(min_crop_share)
    if name == "flip":
        return Flip()
    known = sorted([*TRANSFORMS, "crop", "flip"])
    if ":" not in name and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown task {name!r}; available: {', '.join(known)}, or package.module:ClassName.{hint}")
    return build_transform(name, **ranges)
