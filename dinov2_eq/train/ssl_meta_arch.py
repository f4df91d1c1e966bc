"""Student, teacher and their objectives."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2_eq.objectives.base import Objective
from dinov2_eq.train.gradient_share import GradientShare
from dinov2_eq.train.schedules import ScheduledValues
from dinov2_eq.types import GLOBAL, CropTokens, Group, NetworkOutput, Scene, StepOutput, ViewBatch


class Network(nn.ModuleDict):
    """Student or teacher: "backbone", "projection" and heads, with parameter names as in DINOv2's teacher files."""

    def forward(self, groups: Mapping[str, Group]) -> NetworkOutput:
        """Encodes all groups of views in one pass; returns tokens by group."""
        features = self["backbone"](
            [group.images.flatten(0, 1) for group in groups.values()],
            [None if group.masks is None else group.masks.flatten(0, 1) for group in groups.values()],
            is_training=True,
        )
        tokens = {
            name: CropTokens(
                cls=encoded["x_norm_clstoken"].unflatten(0, group.images.shape[:2]),
                patches=encoded["x_norm_patchtokens"].unflatten(0, group.images.shape[:2]),
            )
            for (name, group), encoded in zip(groups.items(), features, strict=True)
        }
        return NetworkOutput(tokens, modules=self)


class SSLMetaArch(nn.Module):
    """Student, teacher and objectives; `forward` returns the losses of a batch and their weighted sum.

    Args:
        teacher: has the modules and initial weights of `student`; None if no objective needs one.
        loss_weights: by name of the objective.
        shares: by name of the objective, for those with a fixed share of the gradient.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | None,
        objectives: Mapping[str, Objective],
        loss_weights: Mapping[str, float],
        shares: Mapping[str, GradientShare] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.objectives = nn.ModuleDict(objectives)
        self.loss_weights = dict(loss_weights)
        self.shares = nn.ModuleDict(shares or {})
        if teacher is not None:
            teacher.requires_grad_(False)
        self.train()

    def forward(self, views: ViewBatch, scheduled: ScheduledValues) -> StepOutput:
        scene = self.encode(views, scheduled)
        losses, metrics = {}, {}
        others = scene
        for share in self.shares.values():
            others = others._replace(student=share.measured(others.student))
        for name, objective in self.objectives.items():
            seen = others
            if name in self.shares:
                factor = self.shares[name].factor(scheduled.progress)
                seen = scene._replace(student=self.shares[name].measured(scene.student, factor))
                metrics[f"gradient_factor/{name}"] = factor
            losses[name], term_metrics = objective(seen)
            metrics |= term_metrics
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        cls = (scene.teacher or scene.student).tokens[GLOBAL].cls
        return StepOutput(total, losses, metrics, cls.detach().flatten(0, 1))

    def encode(self, views: ViewBatch, scheduled: ScheduledValues) -> Scene:
        """Runs the networks that the objectives need."""
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher({GLOBAL: views.groups[GLOBAL]._replace(masks=None)})
        return Scene(views, self.student(views.groups), teacher, scheduled.teacher_temp)

    @property
    def evaluated(self) -> Network:
        """The network to evaluate and release: the teacher, or the student if there is no teacher."""
        return self.student if self.teacher is None else self.teacher

    @torch.no_grad()
    def end_step(self, teacher_momentum: float) -> None:
        """Updates the teacher to m * teacher + (1 - m) * student, and the centres; call it once after each update."""
        if self.teacher is not None:
            move_towards = get_ema_multi_avg_fn(teacher_momentum)
            move_towards(list(self.teacher.parameters()), list(self.student.parameters()), None)
            for theirs, ours in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                theirs.copy_(ours)  # running statistics are averages already
        for module in (*self.objectives.values(), *self.shares.values()):
            module.end_step()

    def trainable_modules(self) -> dict[str, nn.Module]:
        """Returns the modules that the optimizer updates: the student's, and those of objectives (decoders)."""
        modules = {**self.student, **self.objectives}
        return {name: module for name, module in modules.items() if any(True for _ in module.parameters())}

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self
