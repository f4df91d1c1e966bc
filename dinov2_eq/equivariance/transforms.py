"""The transforms g_theta whose effect the features must keep.

A transform draws its parameters (`sample`), shortens them (`scaled`) and applies them to a batch (`apply`). The task
applies `apply(u, theta)` to make the transformed view and `apply(u, scaled(theta, k / (K + 1)))`, k = 1..K, to make
the intermediate targets (Wang et al., arXiv 2503.18753, section 3).

A transform of your own is a subclass with one decorator; name it in `equivariance.transform`, or as
`package.module:ClassName` when nothing else imports its module:

    @register_transform("gamma")
    class Gamma(Transform):
        components = ("log_gamma",)

        def __init__(self, ranges: TransformRanges) -> None:
            super().__init__(low=[-0.5], high=[0.5])

        def apply(self, images, theta, size):
            return images.clamp(min=1e-6) ** theta[:, 0].exp()[:, None, None, None]
"""

import difflib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dinov2_eq.equivariance.photometric import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
)
from dinov2_eq.equivariance.warp import se2_canvas_size, warp_se2


@dataclass(frozen=True)
class TransformRanges:
    """Ranges of the transforms; each reads those it needs. Defaults: arXiv 2503.18753, table 2."""

    max_angle_deg: float = 45.0
    max_shift: float = 10 / 224  # share of the side
    max_color: float = 0.4
    max_hue: float = 0.1
    blur_sigma_min_max: Sequence[float] = (0.1, 2.0)


class Transform(ABC):
    """A family g_theta of image transforms with P real parameters; theta = 0 is the identity."""

    components: ClassVar[tuple[str, ...]]  # names of the P parameters, the unit in the name

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        # On the CPU even where modules are built on the meta device, since objectives read the range there.
        self.low = torch.tensor(low, device="cpu")  # [P]
        self.high = torch.tensor(high, device="cpu")  # [P]

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws theta uniformly from [low, high]: [batch, P] on the generator's device."""
        uniform = torch.rand(batch, len(self.components), generator=generator, device=generator.device)
        return self.low.to(uniform) + (self.high - self.low).to(uniform) * uniform

    def scaled(self, theta: Tensor, fraction: float) -> Tensor:
        """Scales each parameter by `fraction`, as in the paper; for SE(2) that is no power of the group element."""
        return theta * fraction

    @property
    def largest(self) -> Tensor:
        """Largest size of each parameter, [P]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def strength(self, theta: Tensor) -> Tensor:
        """Returns the largest parameter of each theta as a share of its `largest`: [batch] in [0, 1]."""
        largest = torch.where(self.largest > 0, self.largest, 1.0)
        return (theta / largest.to(theta)).abs().amax(dim=1)

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(Hc, Wc) of the image that `apply` needs to fill `size` = (H, W) with real pixels only."""
        return size

    @abstractmethod
    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        """g_theta(images).

        Args:
            images: [B, C, Hc, Wc] in [0, 1], not normalised: an image of `size`, or a canvas of `canvas_size(size)`
                around it, in which case no black border appears.
            theta: [B, P].
            size: (H, W) of the result.

        Returns:
            [B, C, H, W]
        """


TRANSFORMS: dict[str, type[Transform]] = {}


def register_transform(name: str) -> Callable[[type[Transform]], type[Transform]]:
    """Class decorator: makes the transform known under `name`."""

    def register(cls: type[Transform]) -> type[Transform]:
        TRANSFORMS[name] = cls
        return cls

    return register


def build_transform(name: str, **ranges) -> Transform:
    """Builds the transform called `name` with the given `TransformRanges`.

    Raises:
        ValueError: no transform of that name, or its module cannot be imported.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = vars(importlib.import_module(module)).get(attribute)
        except ImportError as error:
            raise ValueError(
                f"transform={name!r}: module {module!r} cannot be imported ({error}); "
                "install the module, or run where it lies with PYTHONPATH=."
            ) from error
        if not (isinstance(found, type) and issubclass(found, Transform)):
            raise ValueError(f"transform={name!r}: module {module!r} has no Transform named {attribute!r}")
        return found(TransformRanges(**ranges))
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(name, TRANSFORMS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"transform={name!r} is unknown; available: {', '.join(sorted(TRANSFORMS))}, "
            f"or package.module:ClassName.{hint}"
        )
    return TRANSFORMS[name](TransformRanges(**ranges))


class PlanarMotion(Transform):
    """Rotation about the image centre followed by a shift; subclasses say which of the three parameters they have."""

    def __init__(self, ranges: TransformRanges) -> None:
        limits = {"angle_deg": ranges.max_angle_deg, "shift_x": ranges.max_shift, "shift_y": ranges.max_shift}
        high = [limits[name] for name in self.components]
        super().__init__(low=[-limit for limit in high], high=high)
        self.max_angle_deg = ranges.max_angle_deg if "angle_deg" in self.components else 0.0
        self.max_shift = ranges.max_shift if "shift_x" in self.components else 0.0

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return se2_canvas_size(size, self.max_angle_deg, self.max_shift)

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        parameters = dict(zip(self.components, theta.unbind(1), strict=True))
        still = theta.new_zeros(len(theta))
        shift = torch.stack([parameters.get("shift_x", still), parameters.get("shift_y", still)], dim=1)
        return warp_se2(images, parameters.get("angle_deg", still), shift, size)


@register_transform("rotation")
class Rotation(PlanarMotion):
    components = ("angle_deg",)


@register_transform("translation")
class Translation(PlanarMotion):
    components = ("shift_x", "shift_y")


@register_transform("se2")
class SE2(PlanarMotion):
    components = ("angle_deg", "shift_x", "shift_y")


@register_transform("color_jitter")
class ColorJitter(Transform):
    """Brightness, contrast, saturation (factor 1 + value) and hue (turns), always in this order."""

    components = ("brightness", "contrast", "saturation", "hue")

    def __init__(self, ranges: TransformRanges) -> None:
        high = [ranges.max_color] * 3 + [ranges.max_hue]
        super().__init__(low=[-limit for limit in high], high=high)

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        brightness, contrast, saturation, hue = theta.unbind(1)
        images = adjust_brightness(images, 1 + brightness)
        images = adjust_contrast(images, 1 + contrast)
        images = adjust_saturation(images, 1 + saturation)
        return adjust_hue(images, hue)


@register_transform("blur")
class Blur(Transform):
    """Gaussian blur of sigma pixels; sigma 0 is no blur."""

    components = ("blur_sigma",)

    def __init__(self, ranges: TransformRanges) -> None:
        low, high = ranges.blur_sigma_min_max
        super().__init__(low=[low], high=[high])
        self.kernel_size = 2 * max(4, math.ceil(2 * high)) + 1  # two sigmas to each side; 9 for the papers' range

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        return gaussian_blur(images, theta[:, 0], self.kernel_size)


@register_transform("all")
class All(Transform):
    """SE(2), then colour jitter, then blur, each with parameters of its own."""

    parts = (SE2, ColorJitter, Blur)
    components = (*SE2.components, *ColorJitter.components, *Blur.components)

    def __init__(self, ranges: TransformRanges) -> None:
        self.steps = [part(ranges) for part in self.parts]
        low, high = (torch.cat([getattr(step, end) for step in self.steps]).tolist() for end in ("low", "high"))
        super().__init__(low, high)

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.steps[0].canvas_size(size)

    def apply(self, images: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
        thetas = theta.split([len(step.components) for step in self.steps], dim=1)
        for step, own in zip(self.steps, thetas, strict=True):
            images = step.apply(images, own, size)
        return images


@register_transform("one_of_all")
class OneOfAll(All):
    """One of rotation, translation, colour jitter and blur for each image; the parameters of the others are 0."""

    kinds = (0, 1, 1, 2, 2, 2, 2, 3)  # of the components

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        theta = super().sample(batch, generator)
        kinds = torch.tensor(self.kinds, device=theta.device)
        drawn = torch.randint(4, (batch, 1), generator=generator, device=theta.device)
        return torch.where(kinds == drawn, theta, 0.0)
