"""Files that say which training classes the labels of another dataset mean."""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class ClassMapping(NamedTuple):
    """Which classes of ImageNet those of ImageNet-R are, say."""

    path: Path
    labels: np.ndarray  # [M] int64: entry i is the training label of the class that has label i elsewhere


def read_class_mapping(path: Path) -> ClassMapping:
    """Reads the labels from an .npy file.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no .npy file, or not a list of different labels.
    """
    try:
        mapping = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"Class mapping {path} does not exist") from None
    except OSError as error:
        raise OSError(f"Class mapping {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # numpy raises whatever it stumbles over in a damaged file
        raise ValueError(f"Class mapping {path} is no .npy file of whole numbers: {error}") from None
    expected = (
        f"Class mapping {path} must be a list of different whole numbers, the training labels of classes 0, 1, ..."
    )
    if not isinstance(mapping, np.ndarray):
        raise ValueError(f"{expected}; it is an archive of several arrays")
    if mapping.ndim != 1 or mapping.dtype.kind not in "iu" or not len(mapping):
        raise ValueError(f"{expected}; its shape is {mapping.shape}, of {mapping.dtype}")
    labels, counts = np.unique(mapping, return_counts=True)
    if labels[0] < 0:
        raise ValueError(f"{expected}; it holds {labels[0]}")
    if counts.max() > 1:
        twice = labels[counts.argmax()]
        raise ValueError(f"{expected}; it holds {twice} {counts.max()} times, and no classifier can tell those apart")
    return ClassMapping(path, mapping.astype(np.int64))
