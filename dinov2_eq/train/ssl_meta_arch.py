"""Student, teacher and the objectives between them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.train.schedules import ScheduledValues
from dinov2_eq.types import CropTokens, NetworkOutput, StepOutput, ViewBatch


class Network(nn.ModuleDict):
    """One side: "backbone", "projection" and the heads, so that parameters are named as in DINOv2's teacher files."""

    def forward(
        self, global_crops: Tensor, masks: Tensor | None = None, local_crops: Tensor | None = None
    ) -> NetworkOutput:
        """global_crops [G, B, C, H, W], masks [G, B, N] or None, local_crops [L, B, C, h, w] or None"""
        groups = [(global_crops, masks)]
        if local_crops is not None and len(local_crops):
            groups.append((local_crops, None))
        features = self["backbone"](
            [crops.flatten(0, 1) for crops, _ in groups],
            [None if group_masks is None else group_masks.flatten(0, 1) for _, group_masks in groups],
            is_training=True,
        )
        tokens = [
            CropTokens(
                cls=found["x_norm_clstoken"].unflatten(0, crops.shape[:2]),
                patches=found["x_norm_patchtokens"].unflatten(0, crops.shape[:2]),
            )
            for (crops, _), found in zip(groups, features, strict=True)
        ]
        return NetworkOutput(tokens[0], tokens[1] if len(tokens) > 1 else None, modules=self)


class SSLMetaArch(nn.Module):
    """The whole method: `forward` gives the losses of a batch; every term is an objective with a weight."""

    def __init__(
        self, student: Network, teacher: Network, objectives: Mapping[str, Objective], loss_weights: Mapping[str, float]
    ) -> None:
        """`teacher` has the modules of `student`, and should start with its weights."""
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.objectives = nn.ModuleDict(objectives)
        self.loss_weights = dict(loss_weights)
        self.teacher.requires_grad_(False)
        self.train()

    def forward(self, batch: ViewBatch, scheduled: ScheduledValues) -> StepOutput:
        with torch.no_grad():
            teacher = self.teacher(batch.global_crops)
        student = self.student(batch.global_crops, batch.masks, batch.local_crops)

        losses, metrics = {}, {}
        for name, objective in self.objectives.items():
            losses[name], term_metrics = objective(student, teacher, batch, scheduled.teacher_temp)
            metrics |= term_metrics
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        return StepOutput(total, losses, metrics, teacher.global_crops.cls.flatten(0, 1))

    @torch.no_grad()
    def end_step(self, teacher_momentum: float) -> None:
        """After every optimizer step: teacher <- m * teacher + (1 - m) * student, and the centres move."""
        move_towards = get_ema_multi_avg_fn(teacher_momentum)
        move_towards(list(self.teacher.parameters()), list(self.student.parameters()), None)
        for objective in self.objectives.values():
            objective.end_step()

    def trainable_modules(self) -> dict[str, nn.Module]:
        """What the optimizer moves: the student's modules, and those that an objective owns (decoders)."""
        modules = {**self.student, **self.objectives}
        return {name: module for name, module in modules.items() if any(True for _ in module.parameters())}

    def train(self, mode: bool = True) -> "SSLMetaArch":
        super().train(mode)
        self.teacher.eval()
        return self
