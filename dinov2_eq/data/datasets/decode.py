"""Decodes images of any format to 8-bit RGB, and the base class of datasets of encoded images."""

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

# Errors that Pillow's decoders raise on broken files, depending on the format.
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
LEVELS_OF_12_BITS = range(256, 4096)  # for the brightest level of a 12-bit image; below 256 it is dark in any case
_pillow_limit = threading.Lock()
_told: set[str] = set()


@dataclass(frozen=True)
class Decoding:
    """Options for decoding image files; each field is a key in the data strings of all datasets that decode files."""

    exif: bool = False  # turn images upright by their EXIF orientation, which DINOv2 does not
    max_megapixels: float = 178.96  # larger images are unreadable; the default is twice Pillow's MAX_IMAGE_PIXELS

    def __post_init__(self) -> None:
        if not 0 < self.max_megapixels < math.inf:
            raise DataError(f"max_megapixels={self.max_megapixels:g} must be a positive number, such as 500.")


class EncodedImages(ImageDataset):
    """A dataset of encoded images; subclasses provide their content."""

    decoding = Decoding()

    @abstractmethod
    def content(self, index: int) -> bytes | Path:
        """The bytes of the encoded image, or the path of its file.

        Raises:
            OSError, EOFError: the content cannot be read; `read` adds the name of the image.
            UnreadableImage: likewise, but it already names the image or a group of images.
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
    """Decodes a file, or its bytes, to RGB; only the first image of a file with several.

    TIFF files are always upright, because Pillow rotates them itself.

    Args:
        name: returns the name of the image; only called for messages.

    Raises:
        UnreadableImage: not an image, a broken one, or one with more than `decoding.max_megapixels`.
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
                        "%s and maybe others have an EXIF orientation, which is not applied, so they may be on their "
                        "side; add :exif=true to the data string to rotate them upright",
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
    """Whether a file, or its bytes, starts like an image of one of the `FORMATS`."""
    try:
        with _without_pillow_limit():
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS).close()
    except DECODE_ERRORS:
        return False
    return True


def _is_turned(image: Image.Image) -> bool:
    """Whether a loaded image has an EXIF orientation other than 1 (upright); damaged EXIF data are ignored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DECODE_ERRORS:
        return False


def to_rgb(image: Image.Image, name: Callable[[], str]) -> Image.Image:
    """Converts an image of any Pillow mode to RGB; 16-bit grey is rescaled to 8 bits, transparency becomes white.

    Raises:
        ValueError: floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        levels = np.asarray(image).astype(np.float64).clip(0, 65535)
        if levels.max() in LEVELS_OF_12_BITS:
            _tell_once(
                "%s and maybe others are 16-bit images that only use 12 bits, so they are nearly black; rescale the "
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
    """Turns off Pillow's size limit, which is global; `Decoding.max_megapixels` replaces it."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _tell_once(message: str, name: Callable[[], str]) -> None:
    """Logs a warning only for the first image that it applies to in this process."""
    if message not in _told:
        _told.add(message)
        logger.warning(message, name())
