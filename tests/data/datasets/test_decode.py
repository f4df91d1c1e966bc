"""Every kind of image becomes 8-bit RGB."""

import io
import logging
import pickle
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2_eq.data.datasets import DATASETS, DataError, UnreadableImage, build_dataset
from dinov2_eq.data.datasets import decode as decode_module
from dinov2_eq.data.datasets.decode import Decoding, decode_image, is_image


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(decode_module, "_told", set())


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decode(image, kind="PNG", **options):
    decoded = decode_image(encode(image, kind, **options), lambda: "test image")
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


# EXIF orientation


def turned(orientation, kind="JPEG"):
    """An encoded image of 8 x 4 pixels, black but for its left half; upright or not."""
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(pixels), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_on_demand(kind, caplog):
    content = turned(6, kind)  # to be turned by a quarter clockwise
    assert decode_image(content, lambda: "as it lies").size == (8, 4)
    (message,) = caplog.messages
    assert message.startswith("as it lies and maybe others have an EXIF orientation") and ":exif=true" in message
    decode_image(content, lambda: "told once")
    assert len(caplog.messages) == 1
    image = decode_image(content, lambda: "", Decoding(exif=True))
    assert image.size == (4, 8) and image.mode == "RGB"
    assert np.asarray(image)[1].min() > 200 and np.asarray(image)[6].max() < 55


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_upright_images_stay_as_they_are(orientation, caplog):
    for exif in (False, True):
        assert decode_image(turned(orientation), lambda: "", Decoding(exif=exif)).size == (8, 4)
    assert not caplog.messages


def test_damaged_exif_data_are_ignored(caplog):
    content = encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0no EXIF data at all")
    assert decode_image(content, lambda: "", Decoding(exif=True)).size == (8, 4)
    assert not caplog.messages


def test_tiff_files_are_always_upright(caplog):
    assert decode_image(turned(6, "TIFF"), lambda: "").size == (4, 8)
    assert not caplog.messages


# the size limit


def test_the_limit_takes_the_place_of_pillows(monkeypatch):
    content = encode(Image.new("1", (200, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert decode_image(content, lambda: "").size == (200, 100)
        assert Image.MAX_IMAGE_PIXELS == 100
        decode_image(content, lambda: "", Decoding(max_megapixels=0.02))
        with pytest.raises(UnreadableImage, match=r"big: it has 0\.02 megapixels, more than max_megapixels=0\.019"):
            decode_image(content, lambda: "big", Decoding(max_megapixels=0.019))
        assert is_image(content)
    assert Image.MAX_IMAGE_PIXELS == 100
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode_image(content, lambda: ""), range(50)))
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_default_limit():
    def png(width, height):
        """A header alone; the size is checked before a pixel is decoded."""
        content = bytearray(encode(Image.new("L", (1, 1))))
        content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        return bytes(content)

    with pytest.raises(UnreadableImage, match=r"it has 200 megapixels, more than max_megapixels=178\.96; .*=200 to"):
        decode_image(png(20000, 10000), lambda: "huge")
    with pytest.raises(UnreadableImage, match="huge: OSError"):  # within the limit; there are no pixels
        decode_image(png(17890, 10000), lambda: "huge")


# keys of data strings


def test_keys_of_data_strings(tmp_path):
    (tmp_path / "1.jpg").write_bytes(turned(8))
    assert build_dataset(f"Folder:root={tmp_path}").read(0).size == (8, 4)
    assert build_dataset(f"Folder:root={tmp_path}:exif=false:max_megapixels=1").read(0).size == (8, 4)
    assert build_dataset(f"Folder:exif=True:root={tmp_path}").read(0).size == (4, 8)
    with pytest.raises(UnreadableImage, match=r"1\.jpg: it has 3\.2e-05 megapixels, .*:max_megapixels=1 to"):
        build_dataset(f"Folder:root={tmp_path}:max_megapixels=0.000001").read(0)


def test_every_dataset_of_encoded_images_has_the_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = turned(6)
    rendered = [f"rendered/synset/object/image_{view}.jpg" for view in (0, 1)]
    for path in ("folder/1.jpg", "classes/a/1.jpg", "imagenet/train/n01/1.jpg", "flat/val/1.jpg", *rendered):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    pq.write_table(pa.table({"image": [content], "label": [3]}), tmp_path / "train.parquet")
    with tarfile.open(tmp_path / "n01.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "1.jpg", "1.jpg")
    np.save(tmp_path / "rendered/train_images.npy", ["/synset/object/"])
    np.save(tmp_path / "rendered/train_labels.npy", [0])
    strings = [
        f"3DIEBench:root={tmp_path}/rendered",
        f"Folder:root={tmp_path}/folder",
        f"ImageFolder:root={tmp_path}/classes",
        f"ImageNet:root={tmp_path}/imagenet",
        f"ImageNet:split=VAL:root={tmp_path}/flat",
        f"Parquet:path={tmp_path}/train.parquet",
        f"CIFAR10:root={tmp_path}",
        f"WebDataset:urls={tmp_path}/n01.tar",
        f"ImageNet22k:root={tmp_path}",
    ]
    assert {string.partition(":")[0] for string in strings} == DATASETS.keys() - {"Shapes"}
    for string in strings:
        assert build_dataset(string).read(0).size == (8, 4)
        dataset = pickle.loads(pickle.dumps(build_dataset(f"{string}:exif=true")))
        assert dataset.read(0).size == (4, 8)
        with pytest.raises(UnreadableImage, match="megapixels, more than max_megapixels=3e-05"):
            build_dataset(f"{string}:max_megapixels=0.00003").read(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (":exif=yes", "exif='yes' is neither true nor false"),
        (":max_megapixels=many", "max_megapixels='many' is not a number"),
        (":max_megapixels=0", "max_megapixels=0 must be a positive number, such as 500"),
        (":max_megapixels=nan", "max_megapixels=nan must be"),
        (":exfi=true", r"Folder has no key 'exfi'; known are root, exif, max_megapixels\. Did you mean 'exif'"),
    ],
)
def test_wrong_keys(tmp_path, options, message):
    (tmp_path / "1.jpg").write_bytes(turned(1))
    with pytest.raises(DataError, match=message):
        build_dataset(f"Folder:root={tmp_path}{options}")


def test_generated_images_have_no_such_keys():
    with pytest.raises(DataError, match=r"Shapes has no key 'exif'; known are split, size, num, seed\."):
        build_dataset("Shapes:exif=true")


# 12 bits in 16


@pytest.mark.parametrize(("brightest", "told"), [(255, False), (256, True), (4095, True), (4096, False)])
def test_images_that_use_12_of_16_bits_are_named(brightest, told, caplog):
    content = encode(Image.fromarray(np.array([[0, brightest]], dtype=np.uint16)))
    with caplog.at_level(logging.WARNING):
        for name in ("first.png", "second.png"):
            decode_image(content, lambda name=name: name)
    assert len(caplog.messages) == told
    if told:
        assert caplog.messages[0].startswith("first.png and maybe others are 16-bit images that only use 12 bits")


# broken files


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the TIFF decoder
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM"])
def test_broken_files_are_unreadable(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encode(noise, kind)
    with pytest.raises(UnreadableImage, match="broken file: "):
        decode_image(content[: len(content) // 2], lambda: "broken file")
    for seed in range(20):  # whatever a decoder makes of it, nothing but UnreadableImage comes out
        damaged = bytearray(content)
        for place in np.random.default_rng(seed).integers(0, min(len(content), 200), 20):
            damaged[place] ^= 0xA5
        try:
            decode_image(bytes(damaged), lambda: "damaged file")
        except UnreadableImage as error:
            assert str(error).startswith("damaged file: ")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_other_files_are_unreadable(content):
    with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
        decode_image(content, lambda: "text file")


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(path)
    with pytest.raises(UnreadableImage, match="no known range"):
        decode_image(path, lambda: str(path))
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        decode_image(tmp_path / "missing.png", lambda: "missing.png")
