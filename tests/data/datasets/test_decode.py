"""Every kind of image becomes 8-bit RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2_eq.data.datasets import UnreadableImage
from dinov2_eq.data.datasets.decode import decode_image


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decode(image, kind="PNG", **options):
    decoded = decode_image(encode(image, kind, **options), "test image")
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    return np.asarray(decoded)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 50)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])
def test_modes_and_tiny_images(mode, size):
    decode(Image.new(mode, size))


def test_grey_is_repeated():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert (decode(Image.fromarray(grey)) == grey[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_rescaled_not_clipped(kind):
    levels = np.array([[0, 128, 257, 256 * 100, 65535]], dtype=np.uint16)
    assert decode(Image.fromarray(levels), kind)[0, :, 0].tolist() == [0, 0, 1, 100, 255]


def test_transparent_pixels_are_white():
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    assert decode(Image.fromarray(pixels, "RGBA"))[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode(image)[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert decode(image, transparency=0)[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_cmyk():
    pixels = decode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels[4, 4].astype(int) - [255, 0, 0]).max() < 10


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    decode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the TIFF decoder
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_broken_files_are_unreadable(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encode(noise, kind)
    with pytest.raises(UnreadableImage, match="broken file: "):
        decode_image(content[: len(content) // 2], "broken file")
    for seed in range(20):  # whatever a decoder makes of it, nothing but UnreadableImage comes out
        damaged = bytearray(content)
        for place in np.random.default_rng(seed).integers(0, min(len(content), 200), 20):
            damaged[place] ^= 0xA5
        try:
            decode_image(bytes(damaged), "damaged file")
        except UnreadableImage as error:
            assert error.name == "damaged file"


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_other_files_are_unreadable(content):
    with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
        decode_image(content, "text file")


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(path)
    with pytest.raises(UnreadableImage, match="no known range"):
        decode_image(path, str(path))
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        decode_image(tmp_path / "missing.png", "missing.png")
