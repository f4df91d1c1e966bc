"""Device, rank, world size and the few collectives the losses need; each is a no-op on one process."""

import os

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


def require_one_process() -> None:
    """Raises ValueError when a launcher started several processes, which would all do the same work."""
    launched = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if launched > 1:
        raise ValueError(
            f"{launched} processes were launched, but this version trains in one. Launch one process on one GPU and "
            "reach the batch that you want with train.accumulation_steps"
        )


def pick_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda", or with "auto" the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use auto or cpu")
    return torch.device(name)


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place; returns its argument."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor
