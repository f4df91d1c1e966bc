"""EquiMod against a slow loop, unknown theta, a predictor that knows what g does, and two processes against one."""

import pytest
import torch

from dinov2_eq.objectives.equimod import EquiMod, EquimodConfig
from dinov2_eq.objectives.linked import LinkReader
from dinov2_eq.objectives.simclr import nt_xent
from dinov2_eq.types import GLOBAL, PATH
from tests.objectives.test_linked import linked_scene
from tests.objectives.test_simclr import BATCH, embeddings, in_a_group, slow_nt_xent
from tests.processes import run_ranks

KNOWN = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])


def build():
    torch.manual_seed(0)
    settings = EquimodConfig(loss_weight=1.0, projector_hidden_dim=16, projector_out_dim=5, temperature=0.3)
    return EquiMod(settings, LinkReader("mean", [2, 1], [4.0, 4.0], [4.0, 4.0]), dim=8)


@pytest.mark.parametrize("num_path", [0, 1])
def test_against_a_loop_over_the_known_pairs(num_path):
    scene, objective = linked_scene(num_path), build()
    tokens = scene.student.tokens
    source = (tokens[PATH] if num_path else tokens[GLOBAL]).patches[0].mean(1)
    source, target = objective.projector(torch.cat([source, tokens[GLOBAL].patches[1].mean(1)])).chunk(2)
    theta = scene.views.theta[:, [2, 1]] / 4 - 1
    predicted = []
    for z, numbers in zip(source, theta, strict=True):
        predicted.append(objective.predictor.weight @ torch.cat([z, numbers]) + objective.predictor.bias)
    expected = slow_nt_xent(torch.stack(predicted)[:2], target[:2], 0.3)  # the third is unknown
    torch.testing.assert_close(objective(scene).loss, expected)


def test_a_predictor_that_knows_what_theta_does_costs_less():
    """Views whose embeddings move by theta: with the right predictor pairs are perfect, without they are not."""
    source = torch.nn.functional.normalize(embeddings()[0], dim=1)
    theta = torch.linspace(-1, 1, BATCH)[:, None]
    target = torch.cat([source[:, :1] + theta, source[:, 1:]], dim=1)
    predictor = build().predictor
    with torch.no_grad():
        predictor.weight.copy_(torch.eye(5, 7))
        predictor.bias.zero_()
        ignoring = predictor(torch.cat([source, theta, theta], dim=1))
        predictor.weight[0, 5] = 1
        knowing = predictor(torch.cat([source, theta, theta], dim=1))
    torch.testing.assert_close(knowing, target)
    assert nt_xent(knowing, target, 0.2) < nt_xent(ignoring, target, 0.2) - 0.1


def gradient_of_a_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views = embeddings()[:, own].requires_grad_()
    (nt_xent(*views, 0.2, KNOWN[own]) / world).backward()  # gradients are averaged over processes
    return views.grad.numpy()


def test_two_processes_equal_one():
    views = embeddings().requires_grad_()
    nt_xent(*views, 0.2, KNOWN).backward()
    shares = run_ranks(in_a_group, 2, gradient_of_a_share)
    found = torch.cat([torch.from_numpy(share) for share in shares], dim=1)
    assert (found - views.grad).norm() < 1e-6 * views.grad.norm()
