"""The one signature of every loss term."""

from abc import ABC, abstractmethod

from torch import nn

from dinov2_eq.types import NetworkOutput, Term, ViewBatch


class Objective(nn.Module, ABC):
    """One loss term and whatever only that term needs (decoders, centres). Its parameters train with the student."""

    @abstractmethod
    def forward(self, student: NetworkOutput, teacher: NetworkOutput, batch: ViewBatch, teacher_temp: float) -> Term:
        """The unweighted loss of a batch."""

    def end_step(self) -> None:
        """Called once after every optimizer step, for whatever moves once per step whatever the accumulation."""
