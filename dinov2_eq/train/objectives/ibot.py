"""iBOT: the student predicts what the teacher says of the patches that the student does not see."""

import torch
from torch import nn

from dinov2_eq.loss.ibot_patch_loss import ibot_loss
from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.types import NetworkOutput, Term, ViewBatch


class IbotObjective(Objective):
    def __init__(self, targets: nn.Module, head: str) -> None:
        """`head` is "ibot_head", or "dino_head" where the two terms share one."""
        super().__init__()
        self.targets = targets
        self.head = head

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, batch: ViewBatch, teacher_temp: float) -> Term:
        masks = batch.masks  # [G, B, N]
        weights = 1 / masks.sum(-1, keepdim=True).clamp(min=1)  # [G, B, 1]: every masked crop counts the same
        weights = weights.expand(masks.shape)[masks]  # [M]
        with torch.no_grad():
            probabilities = self.targets(teacher.logits(self.head, teacher.global_crops.patches[masks]), teacher_temp)
        logits = student.logits(self.head, student.global_crops.patches[masks])  # [M, P]
        return Term(ibot_loss(logits, probabilities, weights, num_crops=masks.shape[0] * masks.shape[1]), {})

    def end_step(self) -> None:
        self.targets.end_step()
