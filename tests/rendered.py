"""A data set in the layout of 3DIEBench whose images show both hues, and no object."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def random_latents(generator: np.random.Generator, num: int) -> np.ndarray:
    """[num, 7], in the ranges of 3DIEBench."""
    low = [-math.pi / 2] * 3 + [0] * 4
    high = [math.pi / 2] * 3 + [1, math.pi / 4, 2 * math.pi, 1]
    return generator.uniform(low, high, (num, 7))


def write_objects(
    root: Path, objects: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[int]], views: int, size: int = 40
) -> None:
    """Writes images, latents and split files; the upper half of an image has the floor's hue, the rest the light's."""
    generator = np.random.default_rng(0)
    for split, names in objects.items():
        np.save(root / f"{split}_images.npy", [f"/{name}/" for name in names])
        np.save(root / f"{split}_labels.npy", labels[split])
        for name in names:
            (root / name).mkdir(parents=True)
            for view, latents in enumerate(random_latents(generator, views)):
                image = Image.new("RGB", (size, size), colour(latents[3]))
                image.paste(colour(latents[6]), (0, size // 2, size, size))
                image.save(root / name / f"image_{view}.jpg", quality=95)
                np.save(root / name / f"latent_{view}.npy", latents)


def colour(hue: float) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.8, 0.8))
