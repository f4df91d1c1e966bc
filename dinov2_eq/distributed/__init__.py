"""Device, rank, world size and the few collectives that the code needs; on a single process each is a no-op."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_eq.waiting import waiting_for

PATIENCE_S = 5.0  # how long a stop signal waits while the main process reads something for all

Result = TypeVar("Result")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_local_world_size() -> int:
    """Number of processes on this node."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Chooses the device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Args:
        local_rank: index of the GPU on the node. If the launcher shows each process only its own GPU, that is number 0.

    Raises:
        ValueError: "cuda" without a GPU, or fewer GPUs than processes on the node.
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not num_gpus:
        raise ValueError("device cuda: torch sees no GPU here; use auto or cpu")
    if local_rank >= num_gpus > 1:
        raise ValueError(
            f"process {local_rank} of this node has no GPU, torch sees {num_gpus}; launch one process per GPU"
        )
    return torch.device("cuda", local_rank % num_gpus) if local_rank else torch.device(name)


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows of W processes: [n, ...] on each, with the same n, -> [W * n, ...], ordered by rank."""
    if not is_distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        first = get_rank() * ctx.num_rows
        return all_reduce_sum(gradient.contiguous().clone())[first : first + ctx.num_rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous().clone())


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """Gathers [n, ...] of every process, the same n on each, to [W * n, ...], ordered by rank.

    The gradient of a row is the sum of what all processes' losses say of it: with gradients averaged over processes,
    that is the gradient of the mean of their losses.
    """
    return _GatherRows.apply(rows) if is_distributed() else rows


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sums over all processes; the gradient is summed likewise."""
    return _Sum.apply(tensor) if is_distributed() else tensor


def gather_objects(value: Any) -> list[Any]:
    """Collects one picklable value from each process, ordered by rank."""
    gathered: list[Any] = [value] * get_world_size()
    if is_distributed():
        dist.all_gather_object(gathered, value)
    return gathered


def from_main_process(function: Callable[[], Result], what: str = "") -> Result:
    """Calls `function` on the main process only, and returns its result (or raises its exception) on all processes.

    Use it to read or change files, so that all processes continue with the same answer.

    Args:
        what: names a long wait that a signal may end without loss, see `waiting_for`; "": not such a wait.
    """
    with waiting_for(what, patience_s=PATIENCE_S) if what else nullcontext():
        if not is_distributed():
            return function()
        outcome: list[Any] = [None, None]
        if is_main_process():
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
