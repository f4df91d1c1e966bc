"""Rank, world size and the few collectives the losses need; each is a no-op on one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place; returns its argument."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor
