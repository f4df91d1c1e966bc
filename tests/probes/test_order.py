"""Triplet order accuracy and Spearman's correlation against slow loops and scipy."""

import pytest
import torch
from scipy.stats import spearmanr

from dinov2_eq.probes.order import feature_distances, order_accuracy, spearman, spearman_across


def slow_accuracy(column):
    pairs = [(a, b) for index, a in enumerate(column) for b in column[index + 1 :]]
    return sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def drawn(levels=None):
    """Distances [6, 40]; with few levels there are many ties."""
    generator = torch.Generator().manual_seed(0)
    if levels:
        return torch.randint(levels, (6, 40), generator=generator).float()
    return torch.rand(6, 40, generator=generator)


@pytest.mark.parametrize("levels", [None, 3])
def test_against_loops(levels):
    distances = drawn(levels)
    for column, accuracy, correlation in zip(
        distances.T.tolist(), order_accuracy(distances), spearman(distances), strict=True
    ):
        assert accuracy.item() == pytest.approx(slow_accuracy(column))
        assert correlation.item() == pytest.approx(spearmanr(range(6), column).statistic)


def test_right_wrong_and_no_order():
    rising = torch.tensor([[0.1, 3.0, 2.0], [0.2, 2.0, 2.0], [5.0, 1.0, 2.0]])
    assert order_accuracy(rising).tolist() == [1, 0, 0.5]
    assert spearman(rising).tolist() == pytest.approx([1, -1, 0])


def test_only_the_order_counts():
    distances = drawn()
    for measure in (order_accuracy, spearman):
        assert torch.equal(measure(distances), measure(distances.exp()))


def test_chance_is_one_half():
    many = torch.rand(5, 20000, generator=torch.Generator().manual_seed(1))
    assert order_accuracy(many).mean().item() == pytest.approx(0.5, abs=0.01)
    assert spearman(many).mean().item() == pytest.approx(0, abs=0.02)


def test_distances_are_exact_for_features_that_are_nearly_alike():
    base = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    changed = torch.stack([base + step * torch.roll(base, 1, dims=1) for step in (1e-4, 1e-3, 1.0)])
    expected = 1 - torch.nn.functional.cosine_similarity(base.double()[None], changed.double(), dim=-1)
    torch.testing.assert_close(feature_distances(base, changed).double(), expected, rtol=1e-2, atol=0)
    assert feature_distances(base, -base[None]).tolist() == [pytest.approx([2.0] * 4)]


def test_across_images_a_distance_must_mean_the_same_strength():
    near, far = torch.arange(1.0, 5), torch.arange(1.0, 5) + 10
    assert spearman_across(torch.stack([near, near], dim=1)) == pytest.approx(1)
    assert spearman_across(torch.stack([near, far], dim=1)) == pytest.approx(
        spearmanr([0, 1, 2, 3] * 2, torch.cat([near, far])).statistic
    )
    assert spearman(torch.stack([near, far], dim=1)).tolist() == pytest.approx([1, 1])
    assert spearman_across(torch.ones(3, 4)) == 0
