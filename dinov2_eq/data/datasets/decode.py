"""Encoded images of any kind to 8-bit RGB, and the datasets that hold such images."""

import io
import logging
import math
import struct
import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinov2_eq.data.datasets.base import DataError, ImageDataset, UnreadableImage

logger = logging.getLogger(__name__)

# What Pillow's decoders raise on broken files, depending on the format.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "TIFF", "BMP", "PPM")  # those of `listing.EXTENSIONS`
LEVELS_OF_12_BITS = range(256, 4096)  # the brightest level of a 12-bit camera's picture; below, all is dark anyway
_pillow_limit = threading.Lock()
_told: set[str] = set()


@dataclass(frozen=True)
class Decoding:
    """How files become images; each field is a key in the data strings of all datasets that decode files."""

    exif: bool = False  # turn images upright by their EXIF orientation, which DINOv2 does not
    max_megapixels: float = 178.96  # larger images are unreadable; the default is twice Pillow's MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        if not 0 < self.max_megapixels < math.inf:
            raise DataError(f"max_megapixels={self.max_megapixels:g} must be a positive number, such as 500.")


class EncodedImages(ImageDataset):
    """Images that lie encoded in files; subclasses say where."""

    decoding = Decoding()

    @abstractmethod
    def content(self, index: int) -> bytes | Path:
        """The encoded image, or the file that is one.

        Raises:
            OSError, EOFError: the content cannot be read; `read` names the image.
            UnreadableImage: likewise, with a name of its own.
        """

    def read(self, index: int) -> Image.Image:
        try:
            source = self.content(index)
        except (OSError, EOFError) as error:
            raise UnreadableImage(self.name(index), f"{type(error).__name__}: {error}") from error
        return decode_image(source, partial(self.name, index), self.decoding)


def decode_image(
    source: bytes | Path, name: Callable[[], str], decoding: Decoding = EncodedImages.decoding
) -> Image.Image:
    """Decodes a file, or what is in it, to RGB; of several images in one file, the first.

    TIFF files come out upright in any case, because Pillow turns them.

    Args:
        name: gives the name of the image, for messages; called only if there is one.

    Raises:
        UnreadableImage: no image, a broken one, or one of more than `decoding.max_megapixels`.
    """
    try:
        with _without_pillow_limit(), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > decoding.max_megapixels:
                raise UnreadableImage(
                    name(),
                    f"it has {megapixels:.6g} megapixels, more than max_megapixels={decoding.max_megapixels:g}; to "
                    f"read it, add :max_megapixels={math.ceil(megapixels)} to the data string",
                )
            image.load()
            if _is_turned(image):
                if decoding.exif:
                    image = ImageOps.exif_transpose(image)
                else:
                    _tell_once(
                        "%s and maybe others have an EXIF orientation, which is not applied, so they may lie on their "
                        "side; add :exif=true to the data string to turn them upright",
                        name,
                    )
            return to_rgb(image, name)
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            name(), "UnidentifiedImageError: not an image, or in a format that is not supported"
        ) from error
    except DECODE_ERRORS as error:
        raise UnreadableImage(name(), f"{type(error).__name__}: {error}") from error


def is_image(source: bytes | Path) -> bool:
    """Whether this file, or its content, begins as an image of one of the `FORMATS`."""
    try:
        with _without_pillow_limit():
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS).close()
    except DECODE_ERRORS:
        return False
    return True


def _is_turned(image: Image.Image) -> bool:
    """Whether a loaded image has an EXIF orientation other than 1, upright. Damaged EXIF data count as none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DECODE_ERRORS:
        return False


def to_rgb(image: Image.Image, name: Callable[[], str]) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit grey is rescaled to 8 bits, transparent pixels are shown on white.

    Raises:
        ValueError: floating-point pixels, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow clips it when it converts
        levels = np.asarray(image).astype(np.float64).clip(0, 65535)
        if levels.max() in LEVELS_OF_12_BITS:
            _tell_once(
                "%s and maybe others are 16-bit images that use 12 bits at most, so they are nearly black; rescale the "
                "files to levels up to 65535",
                name,
            )
        return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """`Decoding.max_megapixels` takes the place of Pillow's limit, which is one for the whole process."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _tell_once(message: str, name: Callable[[], str]) -> None:
    """Warns of the first image of a kind that this process meets."""
    if message not in _told:
        _told.add(message)
        logger.warning(message, name())
