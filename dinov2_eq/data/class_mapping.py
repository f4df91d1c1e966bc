"""Reads class mappings: files that map the labels of a test set to those of the training set."""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class ClassMapping(NamedTuple):
    """The training labels of the M classes of a test set, for example of ImageNet-R in ImageNet."""

    path: Path
    labels: np.ndarray  # [M] int64: entry i is the training label of the test set's class i


def read_class_mapping(path: Path) -> ClassMapping:
    """Reads a class mapping from an .npy file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not an .npy file, or not a list of different labels.
    """
    try:
        mapping = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"Class mapping {path} does not exist") from None
    except OSError as error:
        raise OSError(f"Class mapping {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # on a damaged file, numpy may raise anything
        raise ValueError(f"Class mapping {path} is not an .npy file of whole numbers: {error}") from None
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
        raise ValueError(f"{expected}; it holds {twice} {counts.max()} times, so these classes cannot be distinguished")
    return ClassMapping(path, mapping.astype(np.int64))
