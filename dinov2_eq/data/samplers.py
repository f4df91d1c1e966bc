"""The order of the training images: one endless stream for all processes together."""

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.seeding import Stream, torch_generator

WINDOW_CHUNKS = 16
WINDOW_IMAGES = 2**16


class StreamSampler(Sampler[tuple[int, int]]):
    """Yields (position, index) for one process, endlessly.

    Every pass of the stream contains each image once, in an order drawn from (seed, pass). Positions count the samples
    of all processes, so the image at a position depends neither on the world size nor on when a run was resumed. In
    microbatch m, rank r takes B = `local_batch_size` positions, starting at start_position + (m * world_size + r) * B.

    Args:
        chunk_ends: from `ImageDataset`; keeps images that are read together near each other, see `draw_order`.

    Raises:
        DataError: no images.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        local_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int = 0,
        chunk_ends: np.ndarray | None = None,
    ) -> None:
        if num_images < 1:
            raise DataError("The training dataset is empty; use one with at least one image.")
        self.num_images = num_images
        self.seed = seed
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_position = start_position
        self.chunk_ends = chunk_ends

    def __iter__(self) -> Iterator[tuple[int, int]]:
        current_pass, order = -1, torch.empty(0)
        stride = self.world_size * self.local_batch_size
        for first in count(self.start_position + self.rank * self.local_batch_size, stride):
            for position in range(first, first + self.local_batch_size):
                needed_pass, offset = divmod(position, self.num_images)
                if needed_pass != current_pass:
                    generator = torch_generator(Stream.ORDER, self.seed, needed_pass)
                    current_pass, order = needed_pass, draw_order(self.num_images, self.chunk_ends, generator)
                yield position, int(order[offset])


def draw_order(num_images: int, chunk_ends: np.ndarray | None, generator: torch.Generator) -> Tensor:
    """Draws a permutation [num_images] int64 of all images.

    With `chunk_ends`, first the chunks are shuffled, then the images within windows of consecutive chunks. A window has
    at least `WINDOW_CHUNKS` chunks and on average at least `WINDOW_IMAGES` images. That is enough to mix well, and few
    enough that a node still has the files of a window in memory when it reads them again. With less data than two
    windows, all images are shuffled together.
    """
    num_windows = 1 if chunk_ends is None else min(len(chunk_ends) // WINDOW_CHUNKS, num_images // WINDOW_IMAGES)
    if num_windows < 2:
        return torch.randperm(num_images, generator=generator)
    starts = np.append(0, chunk_ends[:-1])
    shuffled = torch.randperm(len(chunk_ends), generator=generator).numpy()
    windows = []
    for chunks in np.array_split(shuffled, num_windows):
        window = torch.from_numpy(np.concatenate([np.arange(starts[chunk], chunk_ends[chunk]) for chunk in chunks]))
        windows.append(window[torch.randperm(len(window), generator=generator)])
    return torch.cat(windows)
