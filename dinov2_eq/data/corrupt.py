"""Handles unreadable images in training: replaces them with the next image, logs them, and stops at too many."""

import logging
from collections.abc import Callable, Collection
from typing import TypeVar

import torch

from dinov2_eq.data.datasets import DataError, ImageDataset, UnreadableImage
from dinov2_eq.distributed import all_reduce_sum, gather_objects

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_IN_A_ROW = 100
MIN_READS = 100


def read_or_next(dataset: ImageDataset, index: int, read: Callable[[int], T]) -> tuple[T, tuple[str, ...]]:
    """Reads the image at `index`, or the next readable one; also returns the names and errors of the skipped images.

    Args:
        read: reads an image, or a pair of images, of the dataset.

    Raises:
        DataError: `MAX_IN_A_ROW` images in a row, or all images, cannot be read.
    """
    skipped: list[str] = []
    passed = 0
    while passed < len(dataset) and len(skipped) < MAX_IN_A_ROW:
        try:
            return read((index + passed) % len(dataset)), tuple(skipped)
        except UnreadableImage as error:
            skipped.append(str(error))
            passed += 1 + error.rest
    raise DataError(
        f"{min(passed, len(dataset))} images in a row of {dataset.data_string!r} could not be read; the first: "
        f"{skipped[0]}. Check that the files are complete and are images."
    )


class CorruptCounter:
    """Counts unreadable images over all processes; each process logs its own, once per image.

    Attributes `num_read` and `num_corrupt` are totals over all processes up to the last `check`.

    Args:
        max_corrupt_share: largest tolerated share of unreadable images among those read, in [0, 1].
    """

    def __init__(self, max_corrupt_share: float) -> None:
        self.max_corrupt_share = max_corrupt_share
        self.num_read = 0
        self.num_corrupt = 0
        self._unchecked = torch.zeros(2, dtype=torch.int64)  # (read, corrupt) in this process since the last check
        self._told: set[str] = set()

    def add(self, skipped: Collection[str], num_read: int) -> None:
        """Counts the images of one batch of this process.

        Args:
            skipped: name and error of each image that could not be read, as in `Sample`.
            num_read: number of images that could be read.
        """
        self._unchecked += torch.tensor([num_read, len(skipped)])
        for image in skipped:
            if image not in self._told:
                self._told.add(image)
                logger.warning("Unreadable image skipped: %s", image)

    def check(self) -> None:
        """Sums the counts over all processes; all must call it, and all raise together.

        Raises:
            DataError: too many images could not be read, after at least `MIN_READS` attempts.
        """
        num_read, num_corrupt = all_reduce_sum(self._unchecked).tolist()
        self._unchecked.zero_()
        self.num_read += num_read
        self.num_corrupt += num_corrupt
        num_attempts = self.num_read + self.num_corrupt
        if num_attempts >= MIN_READS and self.num_corrupt > self.max_corrupt_share * num_attempts:
            told = set().union(*gather_objects(set(sorted(self._told)[:3])))
            raise DataError(
                f"{self.num_corrupt} of {num_attempts} images could not be read, more than "
                f"train.max_corrupt_share={self.max_corrupt_share} allows; for example {', '.join(sorted(told)[:3])}. "
                "Repair or remove them, or raise train.max_corrupt_share."
            )

    def state_dict(self) -> dict[str, int]:
        """The counts up to the last `check`, the same on all processes."""
        return {"num_read": self.num_read, "num_corrupt": self.num_corrupt}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_read = state["num_read"]
        self.num_corrupt = state["num_corrupt"]
