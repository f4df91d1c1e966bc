"""Reads the labels of ImageNet's validation images from its development kit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from dinov2_eq.data.datasets.base import DataError

VAL_LABELS = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_META = "meta.mat"
# Prints {WordNet id: number} for the 1,000 leaf classes. A separate process, because a damaged file can crash scipy.
_PRINT_CLASSES = """
import json, sys
from scipy.io import loadmat
synsets = loadmat(sys.argv[1], squeeze_me=True)["synsets"]
leaves = synsets[synsets["num_children"] == 0]
numbers = {str(wnid): int(number) for wnid, number in zip(leaves["WNID"], leaves["ILSVRC2012_ID"], strict=True)}
print(json.dumps(numbers))
"""


def read_devkit(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Reads labels [num_images] int64, in the order of the image names, and the sorted WordNet ids of the classes.

    Raises:
        DataError: a file of the kit is damaged.
    """
    class_names, label_of_number = _read_classes(folder / DEVKIT_META)
    path = folder / VAL_LABELS
    try:
        labels = [label_of_number[int(number)] for number in path.read_text().split()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is damaged: {error!r}. It must hold one class number of {DEVKIT_META} per image; copy it again"
        ) from None
    return np.array(labels, dtype=np.int64), class_names


def _read_classes(path: Path) -> tuple[list[str], dict[int, int]]:
    """Reads the sorted WordNet ids, and a mapping from the kit's class numbers to labels, their ranks."""
    done = subprocess.run([sys.executable, "-c", _PRINT_CLASSES, path], capture_output=True, text=True)
    if done.returncode:
        reason = "".join(done.stderr.splitlines()[-1:]) or f"its reader ended with code {done.returncode}"
        raise DataError(f"{path} is not the list of classes of the development kit, or is damaged: {reason}")
    numbers = json.loads(done.stdout)
    class_names = sorted(numbers)
    return class_names, {numbers[name]: label for label, name in enumerate(class_names)}
