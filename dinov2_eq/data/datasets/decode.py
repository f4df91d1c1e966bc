"""Encoded images of any kind to 8-bit RGB."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_eq.data.datasets.base import UnreadableImage

# What Pillow's decoders raise on broken files, depending on the format.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(source: bytes | Path, name: str) -> Image.Image:
    """Decodes a file or its content to RGB; EXIF orientation is left as it is, as in DINOv2.

    Raises:
        UnreadableImage
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit grey is rescaled to 8 bits, transparent pixels are shown on white.

    Raises:
        ValueError: floating-point pixels, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow clips it when it converts
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
