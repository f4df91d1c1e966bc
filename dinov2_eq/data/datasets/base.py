"""What every dataset offers, and the two errors of the data folder."""

from abc import ABC, abstractmethod

import numpy as np
from PIL import Image


class DataError(ValueError):
    """A data string, or what it points to, is wrong; the message says how to put it right."""


class UnreadableImage(Exception):
    """One image cannot be decoded; training replaces it by another one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class ImageDataset(ABC):
    """Images by index, with or without labels. Instances are picklable and hold no open files."""

    data_string = ""  # what the user wrote
    labels: np.ndarray | None = None  # [len] int64, 0 .. num_classes - 1
    class_names: list[str] | None = None
    labels_hint = "Use a labelled dataset, such as ImageFolder:root=..."  # what to do where `labels` is None
    # Where images can only be read many at once, [num_chunks] int64: the first index after each such chunk.
    chunk_ends: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image comes from, for messages."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image in mode RGB.

        Raises:
            UnreadableImage: the file is missing, broken or not an image.
        """


def require_labels(dataset: ImageDataset, what: str) -> np.ndarray:
    """The labels [len] int64, for a purpose (`what`: "k-NN", ...) that cannot do without.

    Raises:
        DataError: the dataset has no labels, or some images have none (negative labels).
    """
    if dataset.labels is None:
        raise DataError(f"{what} needs labels, and {dataset.data_string!r} has none. {dataset.labels_hint}")
    num_missing = int((dataset.labels < 0).sum())
    if num_missing:
        raise DataError(
            f"{what} needs labels, and {num_missing} of {len(dataset)} labels of {dataset.data_string!r} are negative, "
            "which stands for unlabelled. Use a labelled split."
        )
    return dataset.labels
