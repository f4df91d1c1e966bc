"""Sources of the second view of an image, and the parameters that link it to the base view."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.types import Drawn, ImagePair

BORDERS = ("zeros", "canvas")


class Pairing(ABC):
    """A way to make views from a base view u, each at a fraction of the drawn parameters theta."""

    components: tuple[str, ...] = ()  # names of the A parameters in theta
    second: float = 0.0  # fraction of theta at which the second global view lies
    reads_pairs: bool = False  # whether the second global view is an image of its own, read with the first

    @abstractmethod
    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (Hc, Wc) of the pixels around a base view of `size` that `path` needs."""

    @abstractmethod
    def draw(self, pair: ImagePair | None, generator: torch.Generator) -> Drawn:
        """Draws theta [A] for one image, or takes that of the pair."""

    @abstractmethod
    def path(self, canvases: Tensor, theta: Tensor, fractions: Sequence[float], size: tuple[int, int]) -> Tensor:
        """Makes the views at the fractions of theta.

        Args:
            canvases: [B, C, Hc, Wc] in [0, 1].
            theta: [B, A].
            size: (H, W) of the views.

        Returns:
            [F, B, C, H, W]
        """


class NoPairing(Pairing):
    """The second view is another crop of the image, and no parameters are known."""

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def draw(self, pair: ImagePair | None, generator: torch.Generator) -> Drawn:
        return Drawn(torch.zeros(0), known=False)

    def path(self, canvases: Tensor, theta: Tensor, fractions: Sequence[float], size: tuple[int, int]) -> Tensor:
        return canvases.expand(len(fractions), *canvases.shape)


class TransformPairing(Pairing):
    """View at fraction f: g with parameters f * theta, in one resampling of u (arXiv 2503.18753, section 3).

    Args:
        transform: g.
        border: "canvas": real pixels around u wherever the transform brings them in; "zeros": black.
        second: fraction of theta at which the second global view lies: 1 for v2 = g_theta(u), 0 for u.

    Raises:
        ValueError: unknown `border`.
    """

    def __init__(self, transform: Transform, border: str, second: float = 1.0) -> None:
        if border not in BORDERS:
            raise ValueError(f"border={border!r} is unknown; known are {', '.join(BORDERS)}.")
        self.transform = transform
        self.border = border
        self.second = second
        self.components = transform.components

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.transform.canvas_size(size) if self.border == "canvas" else size

    def draw(self, pair: ImagePair | None, generator: torch.Generator) -> Drawn:
        return Drawn(self.transform.sample(1, generator)[0], known=True)

    def path(self, canvases: Tensor, theta: Tensor, fractions: Sequence[float], size: tuple[int, int]) -> Tensor:
        thetas = [theta if fraction == 1 else self.transform.scaled(theta, fraction) for fraction in fractions]
        images = canvases.expand(len(fractions), *canvases.shape).flatten(0, 1)  # [F B, C, Hc, Wc]
        return self.transform.apply(images, torch.cat(thetas), size).unflatten(0, (len(fractions), len(canvases)))


class RenderedPairing(Pairing):
    """The second view is another image of the scene, from a data set of pairs (3DIEBench of SIE, arXiv 2302.10283).

    Nothing lies between the two images, so the only fraction of theta is 1.

    Args:
        components: names of the A parameters in the data set's theta.
    """

    second = 1.0
    reads_pairs = True

    def __init__(self, components: Sequence[str]) -> None:
        self.components = tuple(components)

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def draw(self, pair: ImagePair | None, generator: torch.Generator) -> Drawn:
        """Takes theta of the pair; zeros where it is unknown.

        Raises:
            ValueError: the data set gives another number of parameters.
        """
        if pair is None or pair.theta is None:
            return Drawn(torch.zeros(len(self.components)), known=False)
        if pair.theta.shape != (len(self.components),):
            raise ValueError(
                f"theta of a pair of images has shape {list(pair.theta.shape)}, not one number for each of "
                f"{', '.join(self.components)}."
            )
        return Drawn(pair.theta, known=True)

    def path(self, canvases: Tensor, theta: Tensor, fractions: Sequence[float], size: tuple[int, int]) -> Tensor:
        """Returns the second views; raises ValueError for a fraction other than 1."""
        others = [fraction for fraction in fractions if fraction != 1]
        if others:
            raise ValueError(
                f"A pair of images has no view at {others[0]:g} of theta; only 1, the second image, exists."
            )
        return canvases.expand(len(fractions), *canvases.shape)
