"""VICReg against a slow loop, collapsed and ideal embeddings, and two processes against one."""

import pytest
import torch

from dinov2_eq.objectives.vicreg import VICReg, VicregConfig, vicreg_terms
from tests.objectives.scenes import make_scene, make_side
from tests.objectives.test_simclr import BATCH, DIM, embeddings, in_a_group
from tests.processes import run_ranks


def slow_terms(first, second):
    invariance = sum((a - b) ** 2 for a, b in zip(first.flatten(), second.flatten(), strict=True)) / first.numel()
    variance = covariance = 0.0
    for view in (first, second):
        matrix = torch.cov(view.T)
        for d in range(DIM):
            variance += max(0, 1 - torch.sqrt(matrix[d, d] + 1e-4)) / (2 * DIM)
            covariance += sum(matrix[d, e] ** 2 for e in range(DIM) if e != d) / DIM
    return invariance, variance, covariance


def test_against_a_loop():
    first, second = 0.3 * embeddings()
    for ours, theirs in zip(vicreg_terms(first, second), slow_terms(first, second), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_collapsed_and_ideal_embeddings():
    same = torch.ones(BATCH, DIM)
    assert [term.item() for term in vicreg_terms(same, same)] == pytest.approx([0.0, 0.99, 0.0])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4 / 3, uncorrelated
    assert [term.item() for term in vicreg_terms(signs, signs)] == [0.0, 0.0, 0.0]


def gradient_of_a_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views = (0.3 * embeddings())[:, own].requires_grad_()
    (sum(vicreg_terms(*views)) / world).backward()  # gradients are averaged over processes
    return views.grad.numpy()


def test_two_processes_equal_one():
    views = (0.3 * embeddings()).requires_grad_()
    sum(vicreg_terms(*views)).backward()
    shares = run_ranks(in_a_group, 2, gradient_of_a_share)
    found = torch.cat([torch.from_numpy(share) for share in shares], dim=1)
    assert (found - views.grad).norm() < 1e-6 * views.grad.norm()


def test_the_objective_weighs_its_terms():
    scene = make_scene(make_side(0))
    losses = []
    for coefficients in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4)):
        torch.manual_seed(0)
        objective = VICReg(VicregConfig(1.0, *map(float, coefficients), expander_dim=16), dim=8)
        losses.append(objective(scene).loss)
    torch.testing.assert_close(losses[3], 2 * losses[0] + 3 * losses[1] + 4 * losses[2])
