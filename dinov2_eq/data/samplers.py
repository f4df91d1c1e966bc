"""The order of the images: one endless stream for all processes together."""

from collections.abc import Iterator
from itertools import count

import torch
from torch.utils.data import Sampler

from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.seeding import Stream, torch_generator


class StreamSampler(Sampler[tuple[int, int]]):
    """Yields (position, index) for one process, without end.

    The stream deals every image once in each pass, in an order drawn from (seed, pass). Positions count the samples of
    all processes, so that neither the world size nor a resume changes what a position holds: in microbatch m, rank r
    takes the `local_batch_size` = B positions from start_position + (m * world_size + r) * B on.

    Raises:
        DataError: no images.
    """

    def __init__(
        self, num_images: int, seed: int, local_batch_size: int, rank: int, world_size: int, start_position: int = 0
    ) -> None:
        if num_images < 1:
            raise DataError("The training dataset is empty; give one that holds at least one image.")
        self.num_images = num_images
        self.seed = seed
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_position = start_position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        current_pass, order = -1, torch.empty(0)
        stride = self.world_size * self.local_batch_size
        for first in count(self.start_position + self.rank * self.local_batch_size, stride):
            for position in range(first, first + self.local_batch_size):
                needed_pass, offset = divmod(position, self.num_images)
                if needed_pass != current_pass:
                    generator = torch_generator(Stream.ORDER, self.seed, needed_pass)
                    current_pass, order = needed_pass, torch.randperm(self.num_images, generator=generator)
                yield position, int(order[offset])
