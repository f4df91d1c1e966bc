"""Targets that move once per step, and the terms on hand-made features."""

import pytest
import torch
from torch import nn

from dinov2_eq.equivariance.split import NoSplit
from dinov2_eq.train.objectives.dino import DinoObjective
from dinov2_eq.train.objectives.ibot import IbotObjective
from dinov2_eq.train.objectives.koleo import KoLeoObjective
from dinov2_eq.train.objectives.targets import Centering, build_targets
from dinov2_eq.types import CropTokens, NetworkOutput, ViewBatch


def output(seed, num_local=2, batch=3, patches=4, dim=8):
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"projection": NoSplit(), "dino_head": nn.Linear(dim, 6)})

    def tokens(views):
        return CropTokens(torch.randn(views, batch, dim), torch.randn(views, batch, patches, dim))

    return NetworkOutput(tokens(2), tokens(num_local) if num_local else None, modules)


def view_batch(masks):
    return ViewBatch(torch.zeros(2, 3, 3, 8, 8), torch.zeros(0), masks, torch.zeros(0))


def cross_entropy(target, logits):
    return -(target * torch.log_softmax(logits / 0.1, -1)).sum(-1)


@pytest.mark.parametrize("num_local", [0, 2])
def test_dino_over_all_pairs_of_different_views(num_local):
    student, teacher = output(0, num_local), output(1, 0)
    with torch.no_grad():
        targets = torch.softmax(teacher.modules["dino_head"](teacher.global_crops.cls) / 0.05, -1)
    views = [*student.global_crops.cls]
    if num_local:
        views += [*student.local_crops.cls]
    pairs = [
        cross_entropy(targets[t], student.modules["dino_head"](view)).mean()
        for t in range(2)
        for s, view in enumerate(views)
        if s != t
    ]
    assert len(pairs) == 2 + 2 * num_local
    term = DinoObjective(Centering(6))(student, teacher, view_batch(torch.zeros(2, 3, 4).bool()), 0.05)
    torch.testing.assert_close(term.loss, torch.stack(pairs).mean())
    assert term.metrics["teacher_entropy"] > 0


def test_ibot_weighs_every_masked_crop_the_same():
    student, teacher = output(0), output(1)
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1, :3] = masks[1, 2, 1] = True
    term = IbotObjective(Centering(6), "dino_head")(student, teacher, view_batch(masks), 0.05)
    total = 0.0
    for view, image in ((0, 1), (1, 2)):
        chosen = masks[view, image]
        logits = teacher.modules["dino_head"](teacher.global_crops.patches[view, image, chosen])
        target = torch.softmax(logits / 0.05, -1)
        guess = student.modules["dino_head"](student.global_crops.patches[view, image, chosen])
        total += cross_entropy(target, guess).mean()
    torch.testing.assert_close(term.loss, total / 6)


def test_ibot_without_a_mask_is_zero_and_can_be_trained():
    student, teacher = output(0), output(1)
    objective = IbotObjective(Centering(6), "dino_head")
    term = objective(student, teacher, view_batch(torch.zeros(2, 3, 4).bool()), 0.05)
    term.loss.backward()
    objective.end_step()
    assert term.loss == 0 and torch.isfinite(objective.targets.center).all()


def test_koleo_adds_the_views():
    student = output(0)
    one, two = (
        KoLeoObjective()(student._replace(global_crops=CropTokens(view[None], None)), None, None, 0.05).loss
        for view in student.global_crops.cls
    )
    torch.testing.assert_close(KoLeoObjective()(student, None, None, 0.05).loss, one + two)


def test_the_centre_moves_once_per_step():
    once, accumulated = Centering(6), Centering(6)
    logits = torch.randn(8, 6)
    once(logits, 0.05)
    accumulated(logits[:3], 0.05)
    assert accumulated.center.abs().sum() == 0
    accumulated(logits[3:], 0.05)
    for centering in (once, accumulated):
        centering.end_step()
    torch.testing.assert_close(once.center, 0.1 * logits.mean(0))
    torch.testing.assert_close(accumulated.center, once.center)


def test_build_targets():
    logits = torch.randn(2, 5, 6)
    for name in ("centering", "sinkhorn_knopp"):
        probabilities = build_targets(name, 6)(logits, 0.05)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5))
