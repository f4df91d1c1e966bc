import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov2_eq.probes.accuracy import count_hits
from dinov2_eq.probes.logistic import C_GRID, fit_logistic


@pytest.fixture(scope="module")
def data():
    """Features of 300 training and 200 test images of 5 classes that overlap, in float64."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    labels = torch.arange(500) % 5
    features = centres[labels] + 1.5 * torch.randn(500, 16, generator=generator, dtype=torch.float64)
    return features[:300], labels[:300], features[300:], labels[300:]


def accuracy(fit, features, labels):
    hits = count_hits(fit.weight[None], fit.bias[None], fit.centred(features), labels)
    return hits.top1_percent("mean_accuracy").item()


def test_the_grid_is_dinov2s():
    assert len(C_GRID) == 45 and C_GRID[0] == pytest.approx(1e-6) and C_GRID[-1] == pytest.approx(1e5)
    assert C_GRID[24] == pytest.approx(1.0)


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 1.0, 10.0])
def test_equals_scikit_learn(data, strength):
    train, train_labels, val, val_labels = data
    oracle = LogisticRegression(C=strength, max_iter=10000, tol=1e-10).fit(train.numpy(), train_labels.numpy())
    fit = fit_logistic(train, train_labels, 5, strength)
    assert fit.converged and fit.weight.dtype == torch.float64
    scale = np.abs(oracle.coef_).max()
    assert fit.weight.numpy() == pytest.approx(oracle.coef_, abs=1e-3 * scale + 1e-8)
    bias = fit.bias - fit.weight @ fit.centre
    expected = oracle.intercept_ - oracle.intercept_.mean()
    assert (bias - bias.mean()).numpy() == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())
    assert accuracy(fit, val, val_labels) == pytest.approx(100 * oracle.score(val.numpy(), val_labels.numpy()), abs=0.5)


def test_float32_is_close(data):
    train, train_labels, val, val_labels = data
    types = torch.float64, torch.float32
    double, single = (fit_logistic(train, train_labels, 5, 1.0, dtype=dtype) for dtype in types)
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), double.weight, rtol=0, atol=0.02)
    assert accuracy(single, val, val_labels) == pytest.approx(accuracy(double, val, val_labels), abs=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1e-4, 1e-7, 1e-9])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0])
def test_features_that_are_nearly_alike(data, spread, strength, dtype):
    """With features scaled by s, weights of the same problem are scaled by 1 / s, and C is by 1 / s^2."""
    train, train_labels, val, val_labels = data
    base = 1 + torch.rand(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fit = fit_logistic(base + spread * train, train_labels, 5, strength / spread**2, dtype=dtype)
    plain = fit_logistic(train, train_labels, 5, strength)
    largest = plain.weight.abs().max().item()
    tolerance = 1e-4 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(fit.weight.double() * spread, plain.weight, rtol=0, atol=tolerance * largest)
    found, expected = accuracy(fit, base + spread * val, val_labels), accuracy(plain, val, val_labels)
    assert found == pytest.approx(expected, abs=0 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-7])
def test_where_the_penalty_rules_the_class_means_decide(spread):
    """Balanced classes, and weights of 1e-18: the direction of the gradient alone must tell the classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.eye(4, 24, dtype=torch.float64)[labels] + 0.1 * torch.randn(400, 24, generator=generator).double()
    fit = fit_logistic(5 + spread * features, labels, 4, 1e-6)
    assert accuracy(fit, 5 + spread * features, labels) == 100


def test_separable_data_reach_100_percent():
    labels = torch.arange(40) % 4
    features = torch.eye(4, dtype=torch.float64)[labels]
    assert accuracy(fit_logistic(features, labels, 4, 10.0), features, labels) == 100


def test_shuffled_labels_give_chance(data):
    train, train_labels, val, val_labels = data
    shuffled = train_labels[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert accuracy(fit_logistic(train, shuffled, 5, 1.0), val, val_labels) == pytest.approx(20, abs=12)
    assert accuracy(fit_logistic(train, train_labels, 5, 1.0), val, val_labels) > 60


def test_stopping_early_is_told(data):
    fit = fit_logistic(*data[:2], 5, 1e5, max_iterations=3)
    assert not fit.converged and fit.num_iterations == 3
