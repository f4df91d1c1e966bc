"""A dataset of generated pictures of upright objects, in which rotation, shift, colour and blur are visible."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.seeding import Stream, numpy_generator

SPLITS = ("TRAIN", "VAL")
SUPERSAMPLING = 4
MAX_TILT_DEG = 6.0
Corners = list[tuple[float, float]]  # in [-1, 1], y down
Part = tuple[str, Corners]  # role of the colour, and outline


def _box(left: float, top: float, right: float, bottom: float) -> Corners:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _arc(x: float, y: float, rx: float, ry: float, start_deg: float = 0, end_deg: float = 360) -> Corners:
    """Points along an ellipse; 0 degrees is right, 90 is down."""
    angles = [math.radians(start_deg + (end_deg - start_deg) * step / 40) for step in range(41)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


# Later parts are drawn on top of earlier ones.
OBJECTS: dict[str, list[Part]] = {
    "arrow": [("main", [(0, -0.95), (0.75, -0.1), (0.3, -0.1), (0.3, 0.9), (-0.3, 0.9), (-0.3, -0.1), (-0.75, -0.1)])],
    "house": [
        ("dark", _box(0.35, -0.85, 0.58, -0.2)),
        ("main", _box(-0.7, -0.15, 0.7, 0.9)),
        ("accent", [(-0.95, -0.1), (0, -0.95), (0.95, -0.1)]),
        ("dark", _box(-0.5, 0.25, -0.1, 0.9)),
        ("light", _box(0.15, 0.2, 0.5, 0.55)),
    ],
    "fish": [
        ("accent", [(0.5, 0), (0.95, -0.5), (0.85, 0), (0.95, 0.5)]),
        ("accent", [(-0.2, -0.3), (0.15, -0.75), (0.35, -0.25)]),
        ("main", _arc(-0.15, 0, 0.8, 0.48)),
        ("light", _arc(-0.15, 0.05, 0.72, 0.38, 10, 170)),
        ("light", _arc(-0.6, -0.1, 0.13, 0.13)),
        ("dark", _arc(-0.62, -0.1, 0.07, 0.07)),
    ],
    "face": [
        ("accent", _arc(0, -0.1, 0.85, 0.85, 180, 360)),
        ("main", _arc(0, 0.08, 0.78, 0.84)),
        ("accent", _arc(0, -0.25, 0.8, 0.62, 190, 350)),
        ("light", _arc(-0.3, 0.02, 0.17, 0.15)),
        ("light", _arc(0.3, 0.02, 0.17, 0.15)),
        ("dark", _arc(-0.28, 0.03, 0.08, 0.1)),
        ("dark", _arc(0.32, 0.03, 0.08, 0.1)),
        ("dark", _arc(0, 0.42, 0.36, 0.28, 0, 180)),
    ],
    "tree": [
        ("dark", _box(-0.14, 0.35, 0.14, 0.95)),
        ("main", [(-0.8, 0.5), (0, -0.3), (0.8, 0.5)]),
        ("main", [(-0.62, 0.1), (0, -0.62), (0.62, 0.1)]),
        ("accent", [(-0.42, -0.3), (0, -0.95), (0.42, -0.3)]),
    ],
    "mushroom": [
        ("light", [(-0.22, -0.1), (0.22, -0.1), (0.34, 0.9), (-0.34, 0.9)]),
        ("main", _arc(0, 0.1, 0.92, 0.98, 180, 360)),
        ("light", _arc(-0.4, -0.25, 0.16, 0.16)),
        ("light", _arc(0.15, -0.55, 0.18, 0.16)),
        ("light", _arc(0.5, -0.12, 0.12, 0.12)),
    ],
    "sailboat": [
        ("dark", _box(-0.05, -0.95, 0.05, 0.5)),
        ("light", [(0.1, -0.85), (0.8, 0.35), (0.1, 0.35)]),
        ("accent", [(-0.1, -0.65), (-0.1, 0.35), (-0.65, 0.35)]),
        ("main", [(-0.95, 0.48), (0.95, 0.48), (0.6, 0.9), (-0.6, 0.9)]),
    ],
    "cup": [
        ("main", [*_arc(0.45, 0.15, 0.48, 0.42, -90, 90), *_arc(0.45, 0.15, 0.28, 0.24, 90, -90)]),
        ("main", [(-0.7, -0.45), (0.5, -0.45), (0.38, 0.85), (-0.58, 0.85)]),
        ("dark", _arc(-0.1, -0.45, 0.6, 0.16)),
        ("accent", [(-0.67, -0.1), (0.47, -0.1), (0.44, 0.2), (-0.64, 0.2)]),
    ],
    "key": [
        ("main", [*_arc(0, -0.5, 0.45, 0.45), *_arc(0, -0.5, 0.22, 0.22, 360, 0)]),
        ("main", _box(-0.11, -0.1, 0.11, 0.95)),
        ("accent", _box(0.1, 0.3, 0.42, 0.48)),
        ("accent", _box(0.1, 0.65, 0.52, 0.85)),
    ],
    "letter_f": [
        ("main", _box(-0.6, -0.9, -0.2, 0.9)),
        ("main", _box(-0.6, -0.9, 0.65, -0.53)),
        ("accent", _box(-0.2, -0.2, 0.4, 0.15)),
    ],
}


class Shapes(ImageDataset):
    """`num` generated pictures of `size` x `size` pixels: one object each, upright up to a small tilt, lit from above.

    Picture i only depends on (seed, split, i); its class is i modulo the number of classes. Colours, size and position
    vary independently of the class.
    """

    def __init__(self, split: str = "TRAIN", size: int = 64, num: int = 2000, seed: int = 0) -> None:
        check_split(split, SPLITS)
        for key, value, least in (("size", size, 1), ("num", num, 1), ("seed", seed, 0)):
            if value < least:
                raise DataError(f"{key}={value} is too small; at least {least}")
        self.split = split
        self.size = size
        self.num = num
        self.seed = seed
        self.class_names = list(OBJECTS)
        self.labels = np.arange(num, dtype=np.int64) % len(OBJECTS)

    def __len__(self) -> int:
        return self.num

    def name(self, index: int) -> str:
        return f"Shapes {self.split} picture {index}"

    def read(self, index: int) -> Image.Image:
        generator = numpy_generator(Stream.SHAPES, self.seed, SPLITS.index(self.split), index)
        parts = OBJECTS[self.class_names[self.labels[index]]]
        hue = generator.random()  # of the background; the object has other hues
        background = _draw_background(self.size, hue, generator)
        colours, alpha = _draw_object(self.size, parts, (hue + generator.uniform(0.3, 0.7)) % 1, generator)

        offset = max(1, round(0.04 * self.size))
        fallen = Image.fromarray(np.roll(alpha, (offset, offset // 2), axis=(0, 1)))
        shadow = np.asarray(fallen.filter(ImageFilter.GaussianBlur(0.03 * self.size)), dtype=np.float32) / 255
        cover = alpha[..., None].astype(np.float32) / 255
        picture = background * (1 - 0.5 * shadow[..., None]) * (1 - cover) + colours * cover
        light = np.linspace(1.12, 0.78, self.size)[:, None, None]
        return Image.fromarray((picture * light).clip(0, 255).round().astype(np.uint8))


def _draw_background(size: int, hue: float, generator: np.random.Generator) -> np.ndarray:
    """Draws a gradient from a pale sky to a darker ground, with coarse and fine texture: [size, size, 3] float."""
    sky = _colour(hue, generator.uniform(0.1, 0.4), generator.uniform(0.75, 0.95))
    ground = _colour(hue + generator.uniform(-0.1, 0.1), generator.uniform(0.25, 0.55), generator.uniform(0.4, 0.65))
    horizon = generator.uniform(0.35, 0.75)
    height = (np.arange(size) + 0.5) / size
    share = (1 / (1 + np.exp(-(height - horizon) * generator.uniform(6, 14))))[:, None, None]
    texture = np.zeros((size, size), dtype=np.float32)
    for cells, strength in ((generator.integers(3, 7), 14), (generator.integers(12, 20), 7)):
        noise = Image.fromarray(generator.standard_normal((cells, cells)).astype(np.float32))
        texture += strength * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    return sky * (1 - share) + ground * share + texture[..., None]


def _draw_object(
    size: int, parts: list[Part], hue: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws an object: colours [size, size, 3] float, and its opacity [size, size] uint8."""
    palette = {
        "main": _colour(hue, generator.uniform(0.6, 0.95), generator.uniform(0.7, 1.0)),
        "accent": _colour(hue + generator.uniform(0.1, 0.2), generator.uniform(0.6, 1.0), generator.uniform(0.6, 1.0)),
        "light": _colour(hue, generator.uniform(0.0, 0.2), generator.uniform(0.92, 1.0)),
        "dark": _colour(hue + 0.5, generator.uniform(0.3, 0.6), generator.uniform(0.15, 0.3)),
    }
    radius = generator.uniform(0.26, 0.4)  # shares of the side
    centre = generator.uniform(radius, 1 - radius, 2)
    tilt = math.radians(generator.uniform(-MAX_TILT_DEG, MAX_TILT_DEG))
    rotation = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])

    pixels = SUPERSAMPLING * size
    layer = Image.new("RGBA", (pixels, pixels))
    draw = ImageDraw.Draw(layer)
    for role, corners in parts:
        points = (centre + radius * (np.array(corners) @ rotation)) * pixels
        fill = (*palette[role].round().astype(int).tolist(), 255)
        draw.polygon([tuple(point) for point in points.tolist()], fill=fill)
    drawn = np.asarray(layer.reduce(SUPERSAMPLING))
    return drawn[..., :3].astype(np.float32), drawn[..., 3]


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB colour [3] in [0, 255] from hue in turns, saturation and value."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))
