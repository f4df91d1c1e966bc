"""The interface of every dataset, and the two errors about data."""

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from dinov2_eq.types import ImagePair


class DataError(ValueError):
    """A data string, or the data that it points to, is wrong; the message says how to fix it."""


class UnreadableImage(Exception):
    """An image cannot be decoded; training replaces it with another one.

    Args:
        rest: how many of the images after it cannot be read for the same reason.
    """

    def __init__(self, name: str, reason: str, rest: int = 0) -> None:
        super().__init__(f"{name}: {reason}")
        self.rest = rest


class ImageDataset(ABC):
    """Images by index, with or without labels. Instances are picklable and hold no open files."""

    data_string = ""  # what the user wrote
    labels_hint = "Use a labelled dataset, such as ImageFolder:root=..."  # advice for when `labels` is None
    # [num_chunks] int64, the first index after each chunk, if images can only be read in whole chunks.
    chunk_ends: np.ndarray | None = None

    def read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        """Reads `labels` and `class_names`, for datasets that do not set them; called once, on first use.

        Raises:
            DataError: there are labels, but they cannot be used.
        """
        return None, None

    @cached_property
    def _labels_and_names(self) -> tuple[np.ndarray | None, list[str] | None]:
        return self.read_labels()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels [len] int64, 0 .. num_classes - 1, negative for an unlabelled image; None: no labels at all.

        Training does not read them.

        Raises:
            DataError: there are labels, but they cannot be used.
        """
        return self._labels_and_names[0]

    @cached_property
    def class_names(self) -> list[str] | None:
        """Names of labels 0, 1, ...; None: they have no names. Raises the errors of `labels`."""
        return self._labels_and_names[1]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Origin of the image, such as its path, for messages."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Reads the image in mode RGB.

        Raises:
            UnreadableImage: the file is missing, broken or not an image.
        """


class PairDataset(ImageDataset):
    """Pairs of images of one scene with what leads from the first to the second; `read` reads the first alone."""

    components: tuple[str, ...] = ()  # names of the A parameters in theta; (): nobody knows what leads to the second

    @abstractmethod
    def read_pair(self, index: int, generator: torch.Generator) -> ImagePair:
        """Reads the image at `index` and another one of its scene.

        Args:
            generator: chooses the other one, where there are several.

        Raises:
            UnreadableImage: one of the two cannot be read.
        """


def require_labels(dataset: ImageDataset, what: str) -> np.ndarray:
    """Returns the labels [len] int64 of a dataset that must have them.

    Args:
        what: the purpose, such as "k-NN", for messages.

    Raises:
        DataError: the dataset has no labels, some images are unlabelled, or the labels cannot be used.
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
            "which means unlabelled. Use a labelled split."
        )
    return labels
