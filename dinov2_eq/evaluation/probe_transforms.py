"""The training transforms, plus crop and flip, which have no intermediate views."""

import argparse
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.equivariance.transforms import TRANSFORMS, Transform, TransformRanges, build_transform
from dinov2_eq.objectives.transformed import TransformSettings
from dinov2_eq.settings import lies_in

WITHOUT_STRENGTH = ("crop", "flip")


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
    known = sorted([*TRANSFORMS, *WITHOUT_STRENGTH])
    if ":" not in name and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown task {name!r}; available: {', '.join(known)}, or package.module:ClassName.{hint}")
    return build_transform(name, **ranges)


def ordered_transform(flag: str, name: str, ranges: Mapping[str, Any]) -> Transform:
    """Builds a transform that has strengths to order; raises ValueError, which names the flag, for any other."""
    if name in WITHOUT_STRENGTH:
        raise ValueError(
            f"{flag} {name}: a {name} has no strength to order, as nothing lies between the image and the result; "
            "leave it out"
        )
    try:
        transform = build_transform(name, **ranges)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if not transform.largest.any():
        names = " and ".join(transform.components) or "no parameter"
        raise ValueError(f"{flag} {name}: the range of {names} is 0, so there are no strengths to order; widen it")
    return transform


def add_range_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds a flag for each of `TransformRanges` and returns their group; `ranges_of` reads them."""
    group, defaults = parser.add_argument_group("ranges of the transforms"), TransformRanges()
    for name, meaning in (
        ("max_angle_deg", "rotation"),
        ("max_shift", "share of the side"),
        ("max_color", "brightness, contrast, saturation"),
        ("max_hue", "turns"),
    ):
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=within(name), default=getattr(defaults, name), help=meaning)
    group.add_argument(
        "--blur-sigma",
        nargs=2,
        type=within("blur_sigma_min_max"),
        default=defaults.blur_sigma_min_max,
        metavar=("LOW", "HIGH"),
        help="pixels",
    )
    return group


def ranges_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `build_transform`."""
    names = ("max_angle_deg", "max_shift", "max_color", "max_hue")
    return {name: getattr(args, name) for name in names} | {"blur_sigma_min_max": list(args.blur_sigma)}


def within(setting: str) -> Callable[[str], float]:
    """Returns a parser for a flag with the same range as this setting in training."""
    interval = TransformSettings.__dataclass_fields__[setting].metadata["interval"]

    def number(text: str) -> float:
        if not lies_in(value := float(text), interval):
            raise argparse.ArgumentTypeError(f"must lie in {interval}, got {value:g}")
        return value

    return number
