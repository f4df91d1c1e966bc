"""From the teacher's logits to targets: centring (DINO) or Sinkhorn-Knopp (SwAV)."""

import torch
from torch import Tensor, nn

from dinov2_eq.distributed import all_reduce_sum
from dinov2_eq.loss.dino_clstoken_loss import centered_softmax, sinkhorn_knopp


class Centering(nn.Module):
    """softmax((logits - centre) / temperature); the centre is a moving average of the batch means.

    A step's logits move the centre only when the step ends, over all its forwards and processes at once.
    """

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("step_sum", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("step_count", torch.zeros(()), persistent=False)

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """logits [..., P] -> probabilities [..., P] in float32"""
        rows = logits.flatten(0, -2).float()
        self.step_sum += rows.sum(0)
        self.step_count += len(rows)
        return centered_softmax(logits, self.center, temperature)

    def end_step(self) -> None:
        total, count = all_reduce_sum(self.step_sum), all_reduce_sum(self.step_count)
        if count > 0:  # a step may have no masked patch at all
            self.center.lerp_(total / count, 1 - self.momentum)
        self.step_sum.zero_()
        self.step_count.zero_()


class SinkhornKnopp(nn.Module):
    """Targets that use every prototype equally often within the batch."""

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """logits [..., P] -> probabilities [..., P] in float32; all rows are assigned jointly"""
        return sinkhorn_knopp(logits.flatten(0, -2), temperature).view(logits.shape)

    def end_step(self) -> None:
        pass


def build_targets(centering: str, num_prototypes: int) -> nn.Module:
    return {"centering": lambda: Centering(num_prototypes), "sinkhorn_knopp": SinkhornKnopp}[centering]()
