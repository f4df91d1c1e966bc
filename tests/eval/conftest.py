"""Images that even an untrained encoder tells apart."""

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (30, 60, 220), "green": (40, 190, 60), "grey": (120, 120, 120), "red": (230, 40, 50)}


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Data strings of 4 classes: 48 training images and 22 to report on, in unequal parts."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    strings = {}
    for split, counts in {"train": (12, 12, 12, 12), "val": (4, 8, 7, 3)}.items():
        for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + generator.normal(0, 12, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{number}.png")
        strings[split] = f"ImageFolder:root={root / split}"
    return strings
