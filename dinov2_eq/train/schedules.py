"""Schedules of learning rate, weight decay and teacher, as fvcore schedulers on where = step / steps."""

from typing import NamedTuple

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)

from dinov2_eq.settings import OptimConfig, TeacherConfig


class ScheduledValues(NamedTuple):
    lr: float
    last_layer_lr: float  # of the prototypes, 0 while they are frozen
    backbone_lr: float  # 0 while the backbone is frozen
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    progress: float  # share of the steps that are done


def warmup_then(start: float, warmup_steps: int, steps: int, after: ParamScheduler, reached: float) -> ParamScheduler:
    """Builds a linear ramp from `start` to `reached` over `warmup_steps`, then `after` over the remaining steps."""
    if warmup_steps == 0:
        return after
    warmup = LinearParamScheduler(start, reached)
    if warmup_steps == steps:
        return warmup
    share = warmup_steps / steps
    return CompositeParamScheduler(
        [warmup, after], lengths=[share, 1 - share], interval_scaling=["rescaled", "rescaled"]
    )


def scaled_lr(base_lr: float, scaling_rule: str, global_batch_size: int) -> float:
    """Scales `base_lr` to the peak learning rate for this many images in one optimizer step."""
    rules = {
        "sqrt_wrt_1024": (global_batch_size / 1024) ** 0.5,
        "linear_wrt_256": global_batch_size / 256,
        "none": 1.0,
    }
    return base_lr * rules[scaling_rule]


class Schedules:
    """All scheduled values: `at(step)` gives those of a step, 0 <= step < optim.steps.

    Args:
        lr: peak learning rate, see `scaled_lr`.
    """

    def __init__(self, optim: OptimConfig, teacher: TeacherConfig, lr: float) -> None:
        steps = self.steps = optim.steps
        self.freeze_last_layer_steps = optim.freeze_last_layer_steps
        self.freeze_backbone_steps = optim.freeze_backbone_steps
        self.lr = warmup_then(0.0, optim.warmup_steps, steps, CosineParamScheduler(lr, optim.min_lr), reached=lr)
        self.weight_decay = CosineParamScheduler(optim.weight_decay, optim.weight_decay_end)
        self.teacher_momentum = CosineParamScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher)
        constant = ConstantParamScheduler(teacher.teacher_temp)
        self.teacher_temp = warmup_then(
            teacher.warmup_teacher_temp,
            teacher.warmup_teacher_temp_steps,
            steps,
            constant,
            reached=teacher.teacher_temp,
        )

    def at(self, step: int) -> ScheduledValues:
        where = step / self.steps
        lr = float(self.lr(where))
        return ScheduledValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
            backbone_lr=0.0 if step < self.freeze_backbone_steps else lr,
            weight_decay=float(self.weight_decay(where)),
            teacher_momentum=float(self.teacher_momentum(where)),
            teacher_temp=float(self.teacher_temp(where)),
            progress=where,
        )
