"""Targets from the teacher's logits, by centring (DINO) or Sinkhorn-Knopp (SwAV)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.distributed import all_reduce_sum, get_rank, get_world_size

SMALLEST_MASS = 1e-30  # of a prototype far from all samples; P / SMALLEST_MASS still fits in float32


@torch.no_grad()
def centered_softmax(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Computes targets by centring: softmax((logits - center) / temp) in float32; logits [..., P], center [P]."""
    return F.softmax((logits.float() - center.float()) / temp, dim=-1)


def _max_over_processes(values: Tensor) -> Tensor:
    """Returns the largest value of all processes, a scalar; -inf if no process has any."""
    largest = values.new_zeros(get_world_size())
    largest[get_rank()] = torch.cat([values.flatten(), values.new_tensor([-torch.inf])]).max()
    return all_reduce_sum(largest).max()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, num_iterations: int = 3) -> Tensor:
    """Computes targets that use all prototypes evenly over the samples of all processes (SwAV, arXiv 2006.09882).

    Q = exp(logits / temp)                     # [n, P], rows of all processes
    for _ in range(num_iterations):
        for p in range(P):
            Q[:, p] /= Q[:, p].sum()           # every prototype gets the same mass
        for i in range(n):
            Q[i] /= Q[i].sum()                 # every sample is a distribution
    return Q

    Runs in float32 and never overflows: each sample is scaled to a largest entry of 1, and the factor, which matters
    only in the first round, is kept separately. All processes must call it, even those without samples (n = 0).

    Args:
        logits: [n, P].
        temp: teacher temperature, above 0.
    """
    scores = logits.float() / temp
    largest = scores.amax(dim=1, keepdim=True)  # [n, 1]
    targets = torch.exp(scores - largest)  # [n, P]
    sample_mass = torch.exp(largest - _max_over_processes(largest))  # [n, 1]
    for _ in range(num_iterations):
        prototype_mass = all_reduce_sum((sample_mass * targets).sum(dim=0))  # [P]
        targets /= prototype_mass.clamp(min=SMALLEST_MASS)
        targets /= targets.sum(dim=1, keepdim=True)
        sample_mass = torch.ones_like(sample_mass)
    return targets


class Centering(nn.Module):
    """softmax((logits - centre) / temperature); the centre is a moving average of the batch means.

    The centre moves in `end_step`, by the mean over all forwards and processes of the step.
    """

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("step_sum", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("step_count", torch.zeros(()), persistent=False)

    def forward(self, logits: Tensor, temperature: float, seen: Tensor | None = None) -> Tensor:
        """Turns logits [..., P] into probabilities [..., P] in float32.

        Args:
            seen: logits [..., P] that move the centre instead of `logits`.
        """
        rows = (logits if seen is None else seen).flatten(0, -2).float()
        self.step_sum += rows.sum(0)
        self.step_count += len(rows)
        return centered_softmax(logits, self.center, temperature)

    def end_step(self) -> None:
        total, count = all_reduce_sum(self.step_sum), all_reduce_sum(self.step_count)
        moved = self.center.lerp(total / count, 1 - self.momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center))  # a step may have no masked patch
        self.step_sum.zero_()
        self.step_count.zero_()


class SinkhornKnopp(nn.Module):
    """Targets that use every prototype equally often within the batch."""

    def forward(self, logits: Tensor, temperature: float, seen: Tensor | None = None) -> Tensor:
        """Turns logits [..., P] into probabilities [..., P] in float32; all rows are assigned jointly."""
        return sinkhorn_knopp(logits.flatten(0, -2), temperature).view(logits.shape)

    def end_step(self) -> None:
        pass


def build_targets(centering: str, num_prototypes: int) -> nn.Module:
    return {"centering": lambda: Centering(num_prototypes), "sinkhorn_knopp": SinkhornKnopp}[centering]()
