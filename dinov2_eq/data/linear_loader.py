"""Images for linear classifiers: an endless stream of random crops, and whole images in order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dinov2_eq.data.crops import crop_resized, draw_crop_box
from dinov2_eq.data.datasets import ImageDataset
from dinov2_eq.data.loaders import EvaluationSamples, read_to_evaluate
from dinov2_eq.data.samplers import StreamSampler
from dinov2_eq.data.seeding import Stream, torch_generator
from dinov2_eq.data.workers import Loader

CROP_SCALE = (0.08, 1.0)  # share of the image's area
FLIP_PROBABILITY = 0.5


class RandomCrops(Dataset[tuple[Tensor, int]]):
    """Dataset of random resized crops [3, S, S] uint8, flipped half the time, with labels.

    A crop depends only on (seed, position in the stream) and its image.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, labels: Tensor, image_size: int, seed: int) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = labels
        self.image_size = image_size
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        position, number = place
        image = read_to_evaluate(self.dataset, int(self.indices[number]))
        generator = torch_generator(Stream.SAMPLE, self.seed, position)
        pixels = crop_resized(image, draw_crop_box(image.size, CROP_SCALE, generator), (self.image_size,) * 2)
        if torch.rand(1, generator=generator).item() < FLIP_PROBABILITY:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), int(self.labels[number])


def make_linear_loader(
    dataset: ImageDataset,
    indices: np.ndarray,
    labels: Tensor,
    image_size: int,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    start_position: int = 0,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Makes an endless loader of (images [B, 3, S, S] uint8, labels [B] int64) for one process.

    The batches of all processes together do not depend on their number or on `num_workers`, and a loader that starts at
    `start_position` continues the stream exactly.

    Args:
        indices: [N], images of `dataset` to use, ascending.
        labels: [N] int64.
        batch_size: images of one process.
        start_position: number of samples that all processes together have seen already.

    Raises:
        DataError: while iterating, when an image cannot be read.
    """
    chunk_ends = None if dataset.chunk_ends is None else np.searchsorted(indices, dataset.chunk_ends)
    return Loader(
        RandomCrops(dataset, indices, labels, image_size, seed),
        batch_size=batch_size,
        sampler=StreamSampler(len(indices), seed, batch_size, rank, world_size, start_position, chunk_ends),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def make_whole_image_loader(
    dataset: ImageDataset, indices: Sequence[int], image_size: int, batch_size: int, num_workers: int = 0
) -> DataLoader[Tensor]:
    """Makes a loader like `make_eval_loader`, but uint8 and with the short side resized to S, as in DINOv2's logreg."""
    return Loader(
        Subset(EvaluationSamples(dataset, image_size, short_side=image_size), [int(index) for index in indices]),
        batch_size=batch_size,
        num_workers=num_workers,
    )
