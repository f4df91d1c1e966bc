"""NT-Xent against a slow loop, its value where that is known, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_eq.objectives.simclr import SimCLR, SimclrConfig, nt_xent
from dinov2_eq.types import GLOBAL
from tests.objectives.scenes import make_scene, make_side
from tests.processes import run_ranks

BATCH, DIM = 6, 5


def embeddings(seed=0):
    return torch.randn(2, BATCH, DIM, generator=torch.Generator().manual_seed(seed))


def slow_nt_xent(first, second, temperature):
    views = F.normalize(torch.cat([first, second]), dim=-1)
    number = len(views)
    losses = []
    for i in range(number):
        partner = (i + number // 2) % number
        scores = [views[i] @ views[k] / temperature for k in range(number) if k != i]
        losses.append(torch.logsumexp(torch.stack(scores), 0) - views[i] @ views[partner] / temperature)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_against_a_loop(temperature):
    first, second = embeddings()
    torch.testing.assert_close(nt_xent(first, second, temperature), slow_nt_xent(first, second, temperature))


def test_images_that_take_no_part_might_as_well_be_missing():
    first, second = embeddings().requires_grad_()
    for rows in ([0, 2, 3], [4], list(range(BATCH))):
        known = torch.zeros(BATCH)
        known[rows] = 1
        loss = nt_xent(first, second, 0.2, known)
        torch.testing.assert_close(loss, slow_nt_xent(first[rows], second[rows], 0.2))
        (gradient,) = torch.autograd.grad(loss, [first])
        assert torch.isfinite(gradient).all() and gradient[known == 0].abs().sum() == 0
    none = nt_xent(first, second, 0.2, torch.zeros(BATCH))
    (gradient,) = torch.autograd.grad(none, [first])
    assert none == 0 and gradient.abs().sum() == 0


def test_known_values():
    same = torch.ones(BATCH, DIM)
    assert nt_xent(same, same, 0.2).item() == pytest.approx(math.log(2 * BATCH - 1), rel=1e-6)
    apart = torch.eye(BATCH)  # perfect pairs, orthogonal to all others
    expected = math.log(1 + (2 * BATCH - 2) * math.exp(-1 / 0.2))
    assert nt_xent(apart, apart, 0.2).item() == pytest.approx(expected, rel=1e-6)


def gradient_of_a_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views = embeddings()[:, own].requires_grad_()
    (nt_xent(*views, 0.2) / world).backward()  # gradients are averaged over processes
    return views.grad.numpy()


def in_a_group(function):
    torch.distributed.init_process_group("gloo")
    return function()


def test_two_processes_equal_one():
    views = embeddings().requires_grad_()
    nt_xent(*views, 0.2).backward()
    shares = run_ranks(in_a_group, 2, gradient_of_a_share)
    found = torch.cat([torch.from_numpy(share) for share in shares], dim=1)
    assert (found - views.grad).norm() < 1e-6 * views.grad.norm()


def test_the_objective_projects_what_it_is_told_to_compare():
    settings = SimclrConfig(loss_weight=1.0, projector_hidden_dim=16, projector_out_dim=DIM)
    student = make_side(0)
    for pool in ("cls", "mean"):
        settings.pool = pool
        objective = SimCLR(settings, dim=8)
        tokens = student.tokens[GLOBAL]
        views = tokens.cls if pool == "cls" else tokens.patches.mean(2)
        first, second = objective.projector(views.flatten(0, 1)).chunk(2)
        torch.testing.assert_close(objective(make_scene(student)).loss, slow_nt_xent(first, second, 0.2))
