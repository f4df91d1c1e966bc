"""DINO on class tokens: every view of the student predicts what the teacher says of the other global views."""

import torch
from torch import nn

from dinov2_eq.loss.dino_clstoken_loss import dino_loss
from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.types import NetworkOutput, Term, ViewBatch


class DinoObjective(Objective):
    def __init__(self, targets: nn.Module) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, batch: ViewBatch, teacher_temp: float) -> Term:
        with torch.no_grad():
            teacher_logits = teacher.logits("dino_head", teacher.global_crops.cls)  # [G, B, P]
            probabilities = self.targets(teacher_logits, teacher_temp)
            entropy = torch.special.entr(probabilities).sum(-1).mean()
        crops = [student.global_crops] if student.local_crops is None else [student.global_crops, student.local_crops]
        logits = student.logits("dino_head", torch.cat([crop.cls for crop in crops]))  # [G + L, B, P]
        return Term(dino_loss(logits, probabilities), {"teacher_entropy": entropy})

    def end_step(self) -> None:
        self.targets.end_step()
