"""Random numbers that depend on what they are for, and on nothing else."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """One stream of random numbers for each purpose."""

    ORDER = 0
    SAMPLE = 1
    MASK_ASSIGNMENT = 2
    MASK = 3
    SHAPES = 4
    SUBSET = 5
    DROP_PATH = 6
    KNOWN = 7


def numpy_generator(stream: Stream, *numbers: int) -> np.random.Generator:
    """A generator fixed by its purpose and by whole numbers >= 0 (seed, position, ...)."""
    return np.random.default_rng([stream, *numbers])


def seed_for(stream: Stream, *numbers: int) -> int:
    """A seed in [0, 2**63) fixed in the same way, for generators of torch's own."""
    state = np.random.SeedSequence([stream, *numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def torch_generator(stream: Stream, *numbers: int) -> torch.Generator:
    """As `numpy_generator`, on the CPU."""
    return torch.Generator().manual_seed(seed_for(stream, *numbers))
