"""Files that say which training classes the labels of another dataset mean."""

from pathlib import Path

import numpy as np


def read_class_mapping(path: Path) -> np.ndarray:
    """[M] int64 from an .npy file: entry i is the training label of the class that has label i elsewhere.

    Such a file says which classes of ImageNet those of ImageNet-R are, say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npy file, or not a list of different labels.
    """
    try:
        mapping = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"Class mapping {path} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
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
    return mapping.astype(np.int64)
