"""What every dataset offers, and the two errors of the data folder."""

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
from PIL import Image


class DataError(ValueError):
    """A data string, or what it points to, is wrong; the message says how to put it right."""


class UnreadableImage(Exception):
    """One image cannot be decoded; training replaces it by another one.

    Args:
        rest: how many of the images that follow it cannot be read for the same reason.
    """

    def __init__(self, name: str, reason: str, rest: int = 0) -> None:
        super().__init__(f"{name}: {reason}")
        self.rest = rest


class ImageDataset(ABC):
    """Images by index, with or without labels. Instances are picklable and hold no open files."""

    data_string = ""  # what the user wrote
    labels_hint = "Use a labelled dataset, such as ImageFolder:root=..."  # what to do where `labels` is None
    # Where images can only be read many at once, [num_chunks] int64: the first index after each such chunk.
    chunk_ends: np.ndarray | None = None

    def read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        """`labels` and `class_names`, for datasets that do not set them; called once, when somebody asks.

        Raises:
            DataError: there are labels, but they cannot be used.
        """
        return None, None

    @cached_property
    def _labels_and_names(self) -> tuple[np.ndarray | None, list[str] | None]:
        return self.read_labels()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """[len] int64, 0 .. num_classes - 1, negative for an image without one; None: no labels. Training never asks.

        Raises:
            DataError: there are labels, but they cannot be used.
        """
        return self._labels_and_names[0]

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of labels 0, 1, ...; None: they have none. Raises as `labels`."""
        return self._labels_and_names[1]

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
        DataError: the dataset has no labels, some images have none (negative labels), or they cannot be used.
    """
    try:
        labels = dataset.labels
    except DataError as error:
        raise DataError(f"{what} needs labels, and those of {dataset.data_string!r} cannot be used: {error}") from None
    if labels is None:
        raise DataError(f"{what} needs labels, and {dataset.data_string!r} has none. {dataset.labels_hint}")
    num_missing = int((labels < 0).sum())
    if num_missing:
        raise DataError(
            f"{what} needs labels, and {num_missing} of {len(dataset)} labels of {dataset.data_string!r} are negative, "
            "which stands for unlabelled. Use a labelled split."
        )
    return labels
