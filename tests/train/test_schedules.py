"""Schedules against the formulas."""

import math

import pytest

from dinov2_eq.settings import OptimConfig, TeacherConfig
from dinov2_eq.train.schedules import Schedules, scaled_lr


def schedules(**changes):
    optim = OptimConfig(
        steps=100,
        min_lr=0.1,
        warmup_steps=20,
        freeze_last_layer_steps=5,
        freeze_backbone_steps=10,
        weight_decay=0.04,
        weight_decay_end=0.4,
    )
    teacher = TeacherConfig(0.9, 1.0, 0.04, 0.07, warmup_teacher_temp_steps=30)
    for section in (optim, teacher):
        known = {name: value for name, value in changes.items() if hasattr(section, name)}
        vars(section).update(known)
    return Schedules(optim, teacher, lr=1.0)


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("step", [0, 1, 9, 10, 19, 20, 21, 60, 99])
def test_values(step):
    values = schedules().at(step)
    assert values.lr == pytest.approx(step / 20 if step < 20 else cosine(1.0, 0.1, (step - 20) / 80))
    assert values.last_layer_lr == (0 if step < 5 else values.lr)
    assert values.backbone_lr == (0 if step < 10 else values.lr)
    assert values.weight_decay == pytest.approx(cosine(0.04, 0.4, step / 100))
    assert values.teacher_momentum == pytest.approx(cosine(0.9, 1.0, step / 100))
    assert values.teacher_temp == pytest.approx(0.04 + 0.03 * min(step / 30, 1))


def test_no_warmup_and_nothing_but_warmup():
    assert schedules(warmup_steps=0).at(0).lr == 1
    assert schedules(warmup_steps=100).at(99).lr == pytest.approx(0.99)


def test_scaling_rules():
    assert scaled_lr(0.004, "sqrt_wrt_1024", 2048) == pytest.approx(0.004 * 2**0.5)
    assert scaled_lr(5e-4, "linear_wrt_256", 1024) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, "none", 7) == 1e-3
