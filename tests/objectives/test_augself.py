"""AugSelf against a slow loop, what its head reads, unknown theta, and two processes against one."""

import pytest
import torch

from dinov2_eq.objectives.augself import AugSelf, augself_loss
from dinov2_eq.objectives.linked import LinkReader
from dinov2_eq.types import GLOBAL, PATH
from tests.objectives.test_linked import linked_scene
from tests.objectives.test_simclr import in_a_group
from tests.processes import run_ranks

BATCH, NUMBERS = 6, 3
KNOWN = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])


def numbers():
    """Predictions and theta."""
    return torch.rand(2, BATCH, NUMBERS, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("known", [KNOWN, torch.ones(BATCH)])
def test_against_a_loop(known):
    predicted, theta = numbers()
    rows = [row for row in range(BATCH) if known[row]]
    errors = [(predicted[row, a] - theta[row, a]) ** 2 for row in rows for a in range(NUMBERS)]
    torch.testing.assert_close(augself_loss(predicted, theta, known), sum(errors) / len(errors))


def test_the_middle_of_the_range_costs_a_third():
    theta = torch.linspace(-1, 1, 10001)[:, None]
    assert augself_loss(0 * theta, theta, torch.ones(10001)).item() == pytest.approx(1 / 3, rel=1e-3)


def gradient_of_a_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    predicted, theta = numbers()[:, own]
    predicted.requires_grad_()
    (augself_loss(predicted, theta, KNOWN[own]) / world).backward()  # gradients are averaged over processes
    return predicted.grad.numpy()


def test_two_processes_equal_one():
    predicted, theta = numbers()
    augself_loss(predicted.requires_grad_(), theta, KNOWN).backward()
    shares = run_ranks(in_a_group, 2, gradient_of_a_share)
    found = torch.cat([torch.from_numpy(share) for share in shares])
    assert (found - predicted.grad).norm() < 1e-6 * predicted.grad.norm()


@pytest.mark.parametrize("num_path", [0, 1])
def test_the_head_reads_source_and_target_where_theta_is_known(num_path):
    scene = linked_scene(num_path)
    objective = AugSelf(16, LinkReader("cls", [2, 1], [4.0, 4.0], [4.0, 4.0]), dim=8)
    tokens = scene.student.tokens
    source, target = tokens[PATH].cls[0] if num_path else tokens[GLOBAL].cls[0], tokens[GLOBAL].cls[1]
    predicted = objective.head(torch.cat([source, target], dim=1))
    theta = scene.views.theta[:, [2, 1]] / 4 - 1
    loss = objective(scene).loss
    torch.testing.assert_close(loss, ((predicted - theta)[:2] ** 2).mean())  # the third is unknown
    loss.backward()
    read = [tokens[PATH].cls if num_path else tokens[GLOBAL].cls, tokens[GLOBAL].cls]
    for views, place in zip(read, (0, 1), strict=True):
        assert views.grad[place, :2].abs().sum() > 0 and views.grad[place, 2].abs().sum() == 0


def test_without_known_pairs_there_is_nothing_to_learn():
    scene = linked_scene()
    scene = scene._replace(views=scene.views._replace(known=torch.zeros(3, dtype=torch.bool)))
    objective = AugSelf(16, LinkReader("cls", [0], [0.0], [1.0]), dim=8)
    loss = objective(scene).loss
    loss.backward()
    assert loss == 0 and all(parameter.grad.abs().sum() == 0 for parameter in objective.parameters())
