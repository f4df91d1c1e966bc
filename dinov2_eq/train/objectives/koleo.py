"""KoLeo: spreads the class tokens of a batch, view by view."""

from dinov2_eq.loss.koleo_loss import koleo_loss
from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.types import NetworkOutput, Term, ViewBatch


class KoLeoObjective(Objective):
    def forward(self, student: NetworkOutput, teacher: NetworkOutput, batch: ViewBatch, teacher_temp: float) -> Term:
        return Term(sum(koleo_loss(view) for view in student.invariant(student.global_crops.cls)), {})
