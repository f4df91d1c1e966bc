"""Targets that move once per step, and the terms on hand-made features."""

import pytest
import torch
from torch import nn

from dinov2_eq.objectives.dino import Dino
from dinov2_eq.objectives.ibot import Ibot
from dinov2_eq.objectives.koleo import KoLeo
from dinov2_eq.objectives.targets import Centering, SinkhornKnopp, build_targets
from dinov2_eq.types import GLOBAL, LOCAL, CropTokens
from tests.objectives.scenes import make_scene, make_side

DIM, PROTOTYPES = 8, 6


def sides(num_local=2, masks=None):
    """A scene with a DINO head, and its two heads."""
    heads = [nn.Linear(DIM, PROTOTYPES), nn.Linear(DIM, PROTOTYPES)]
    student = make_side(0, num_local=num_local, dino_head=heads[0])
    teacher = make_side(1, dino_head=heads[1])
    return make_scene(student, teacher, masks), heads


def cross_entropy(target, logits):
    return -(target * torch.log_softmax(logits / 0.1, -1)).sum(-1)


@pytest.mark.parametrize("num_local", [0, 2])
def test_dino_over_all_pairs_of_different_views(num_local):
    scene, (head, teacher_head) = sides(num_local)
    with torch.no_grad():
        targets = torch.softmax(teacher_head(scene.teacher.tokens[GLOBAL].cls) / 0.05, -1)
    views = [*scene.student.tokens[GLOBAL].cls]
    if num_local:
        views += [*scene.student.tokens[LOCAL].cls]
    pairs = [cross_entropy(targets[t], head(view)).mean() for t in range(2) for s, view in enumerate(views) if s != t]
    assert len(pairs) == 2 + 2 * num_local
    term = Dino(Centering(PROTOTYPES))(scene)
    torch.testing.assert_close(term.loss, torch.stack(pairs).mean())
    assert term.metrics["teacher_entropy"] > 0


def test_ibot_weighs_every_masked_crop_the_same():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1, :3] = masks[1, 2, 1] = True
    scene, (head, teacher_head) = sides(masks=masks)
    term = Ibot(Centering(PROTOTYPES), "dino_head")(scene)
    total = 0.0
    for view, image in ((0, 1), (1, 2)):
        chosen = masks[view, image]
        target = torch.softmax(teacher_head(scene.teacher.tokens[GLOBAL].patches[view, image, chosen]) / 0.05, -1)
        guess = head(scene.student.tokens[GLOBAL].patches[view, image, chosen])
        total += cross_entropy(target, guess).mean()
    torch.testing.assert_close(term.loss, total / 6)


def test_ibot_without_a_mask_is_zero_and_can_be_trained():
    scene, _ = sides(masks=torch.zeros(2, 3, 4, dtype=torch.bool))
    objective = Ibot(Centering(PROTOTYPES), "dino_head")
    term = objective(scene)
    term.loss.backward()
    objective.end_step()
    assert term.loss == 0 and torch.isfinite(objective.targets.center).all()


@pytest.mark.parametrize("center_patches", ["masked", "all"])
def test_the_centre_of_ibot_is_the_mean_of_masked_or_of_all_patches(center_patches):
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1, :3] = masks[1, 2, 1] = True
    scene, (_, teacher_head) = sides(masks=masks)
    objective = Ibot(Centering(PROTOTYPES), "dino_head", center_patches)
    loss = objective(scene).loss
    objective.end_step()
    patches = scene.teacher.tokens[GLOBAL].patches
    logits = teacher_head(patches[masks] if center_patches == "masked" else patches.flatten(0, 2))
    torch.testing.assert_close(objective.targets.center, 0.1 * logits.mean(0))
    torch.testing.assert_close(loss, Ibot(Centering(PROTOTYPES), "dino_head")(scene).loss)


def test_koleo_adds_the_views():
    scene, _ = sides()
    views = scene.student.tokens[GLOBAL].cls
    one, two = (
        KoLeo()(scene._replace(student=scene.student._replace(tokens={GLOBAL: CropTokens(view[None], None)}))).loss
        for view in views
    )
    torch.testing.assert_close(KoLeo()(scene).loss, one + two)


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


def test_a_step_without_rows_leaves_the_centre():
    centering = Centering(PROTOTYPES)
    centering(torch.randn(8, PROTOTYPES), 0.05)
    centering.end_step()
    before = centering.center.clone()
    centering(torch.zeros(0, PROTOTYPES), 0.05)
    centering.end_step()
    assert torch.equal(centering.center, before)


def test_build_targets():
    """Centred: shifted by the centre. Sinkhorn: every prototype gets the same mass, also over several axes."""
    logits = torch.randn(2, 5, PROTOTYPES)
    centred, balanced = (build_targets(name, PROTOTYPES) for name in ("centering", "sinkhorn_knopp"))
    centred.center += torch.arange(PROTOTYPES)
    torch.testing.assert_close(centred(logits, 0.5), torch.softmax((logits - torch.arange(PROTOTYPES)) / 0.5, -1))
    assert isinstance(balanced, SinkhornKnopp)
    probabilities = balanced(logits, 1.0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(probabilities.sum((0, 1)), torch.full((PROTOTYPES,), 10 / PROTOTYPES), atol=0.05, rtol=0)
