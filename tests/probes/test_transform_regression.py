import pytest
import torch
from sklearn.preprocessing import StandardScaler

from dinov2_eq.probes.transform_regression import (
    build_head,
    r2_scores,
    regress_transform,
    scale_targets,
    z_scored,
)


def uniform(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_r2_equals_its_definition():
    target, predicted = uniform(50, 3) + torch.tensor([0.0, 1.0, 5.0]), uniform(50, 3, seed=1)
    scores = r2_scores(predicted, target)

    def expected(truth: list[float], guesses: list[float]) -> float:
        mean = sum(truth) / len(truth)
        residual = sum((true - guess) ** 2 for true, guess in zip(truth, guesses, strict=True))
        return 1 - residual / sum((true - mean) ** 2 for true in truth)

    components = [expected(*columns) for columns in zip(target.T.tolist(), predicted.T.tolist(), strict=True)]
    assert scores.components == pytest.approx(components, rel=1e-12)
    assert scores.mean == pytest.approx(sum(components) / 3, rel=1e-12)
    assert scores.pooled == pytest.approx(expected(target.flatten().tolist(), predicted.flatten().tolist()), rel=1e-12)


def test_constant_prediction_scores_zero_but_not_when_pooled_over_different_means():
    target = uniform(100, 2) + torch.tensor([0.0, 3.0])
    scores = r2_scores(target.mean(dim=0).expand(100, 2), target)
    assert scores.components == pytest.approx([0, 0], abs=1e-6) and scores.mean == pytest.approx(0, abs=1e-6)
    assert scores.pooled > 0.8


def test_r2_needs_varying_targets():
    with pytest.raises(ValueError, match="targets that vary"):
        r2_scores(torch.zeros(5, 2), torch.ones(5, 2))


def test_targets_are_scaled_to_one():
    low, high = torch.tensor([-45.0, 0.1]), torch.tensor([45.0, 2.0])
    scaled = scale_targets(torch.stack([low, high, (low + high) / 2]), low, high)
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, -1], [1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="range is empty"):
        scale_targets(torch.zeros(3, 2), torch.zeros(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("head", "epochs"), [("mlp", 80), ("linear", 400)])
def test_parameters_in_the_features_are_found(head, epochs):
    theta = uniform(1200, 2)
    pairs = torch.cat([uniform(1200, 4, seed=1), 3 * theta + 7], dim=1)
    predicted = regress_transform(
        pairs[:1000], theta[:1000], pairs[1000:], seed=0, head=head, hidden_dim=64, epochs=epochs
    )
    assert r2_scores(predicted, theta[1000:]).pooled > 0.95


def test_shuffled_pairs_score_about_zero():
    theta = uniform(1500, 2)
    pairs = torch.cat([uniform(1500, 4, seed=1), theta.roll(1, dims=0)], dim=1)
    predicted = regress_transform(pairs[:1000], theta[:1000], pairs[1000:], seed=0, head="mlp", hidden_dim=16, epochs=3)
    assert r2_scores(predicted, theta[1000:]).mean == pytest.approx(0, abs=0.15)


def test_determined_by_the_seed_and_leaves_the_global_generator_alone():
    theta, pairs = uniform(300, 1), uniform(300, 6, seed=1)

    def run(seed):
        return regress_transform(pairs, theta, pairs, seed=seed, hidden_dim=16, epochs=2)

    torch.manual_seed(0)
    expected_next = torch.rand(1)
    torch.manual_seed(0)
    first = run(0)
    assert torch.rand(1) == expected_next
    torch.testing.assert_close(run(0), first, rtol=0, atol=0)
    assert not torch.equal(run(1), first)


def test_constant_feature_dimensions_do_no_harm():
    theta, pairs = uniform(300, 1), torch.ones(300, 6)
    assert regress_transform(pairs, theta, pairs, seed=0, hidden_dim=16, epochs=1).isfinite().all()


def test_features_are_scaled_as_scikit_learn_does():
    train, val = uniform(200, 5).double() + 3, uniform(50, 5, seed=1).double()
    train[:, 2] = val[:, 2] = 0.1
    oracle = StandardScaler().fit(train.numpy())
    expected = oracle.transform(train.numpy()), oracle.transform(val.numpy())
    correction = (199 / 200) ** 0.5  # torch divides by n - 1
    for found, wanted in zip(z_scored(train, val), expected, strict=True):
        torch.testing.assert_close(found, correction * torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-4, 1e-7, 1e-8])
def test_features_that_are_nearly_alike(spread):
    """The result does not depend on how much the features vary; below a spread of 1e-6 it used to be lost."""
    theta = uniform(1200, 2).double()
    told = torch.cat([uniform(1200, 4, seed=1).double(), theta], dim=1)
    predicted, expected = (
        regress_transform(pairs[:1000], theta[:1000], pairs[1000:], seed=0, hidden_dim=64, epochs=60)
        for pairs in (1 + spread * told, told)
    )
    assert r2_scores(expected, theta[1000:]).mean > 0.9
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-3)


def test_heads():
    widths = [layer.out_features for layer in build_head("mlp", 8, 5, 2, torch.Generator())[::2]]
    assert widths == [5, 5, 2]
    with pytest.raises(ValueError, match="Unknown head 'conv'; available: mlp, linear"):
        build_head("conv", 8, 5, 2, torch.Generator())
