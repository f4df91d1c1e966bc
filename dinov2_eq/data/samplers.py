"""The order of the images: one endless stream for all processes together."""

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
    """Yields (position, index) for one process, without end.

    The stream deals every image once in each pass, in an order drawn from (seed, pass). Positions count the samples of
    all processes, so that neither the world size nor a resume changes what a position holds: in microbatch m, rank r
    takes the `local_batch_size` = B positions from start_position + (m * world_size + r) * B on.

    Args:
        chunk_ends: of `ImageDataset`; images that are read together are then dealt near each other, see `draw_order`.

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
            raise DataError("The training dataset is empty; give one that holds at least one image.")
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
    """A permutation [num_images] int64 of all images.

    With `chunk_ends`, the chunks are shuffled, and then the images within windows of consecutive chunks, at least
    `WINDOW_CHUNKS` each and on average at least `WINDOW_IMAGES` images: enough to mix well, and little enough that a
    node which has fetched a window's files still has them in memory for the next read. Data of less than two windows
    are shuffled as a whole.
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
