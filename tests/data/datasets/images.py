"""Small images of one colour each, for tests."""

import io

from PIL import Image

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (9, 9, 9)]


def encoded(number, size=(8, 6), kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[number]).save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_image(path, number, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number, **options))


def colour(dataset, index):
    return dataset.read(index).getpixel((0, 0))
