import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.probes import cosine, knn
from dinov2_eq.probes.knn import knn_accuracy, knn_predict
from tests.processes import run_ranks


@pytest.fixture(name="data")
def clusters():
    return make_clusters()


def make_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 12, generator=generator)
    train_labels, val_labels = (torch.randint(7, (n,), generator=generator) for n in (120, 60))
    train, val = (
        centres[labels] + 1.5 * torch.randn(len(labels), 12, generator=generator)
        for labels in (train_labels, val_labels)
    )
    return train, train_labels, val, val_labels


def test_scores_equal_the_slow_loop(data):
    train, train_labels, val, _ = data
    (scores,) = knn_predict(train, train_labels, val, ks=[3, 10], temperature=0.07)
    for i in range(len(val)):
        similarities = [F.cosine_similarity(val[i], row, dim=0).item() for row in train]
        nearest = sorted(range(len(train)), key=lambda j: -similarities[j])[:10]
        weights = [math.exp(similarities[j] / 0.07) for j in nearest]
        for k in (3, 10):
            expected = [0.0] * 7
            for j, weight in zip(nearest[:k], weights[:k], strict=True):
                expected[train_labels[j]] += weight / sum(weights)
            torch.testing.assert_close(scores[k][i], torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 20, 120])
def test_top1_equals_scikit_learn(data, k):
    train, train_labels, val, val_labels = data
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    oracle.fit(train.numpy(), train_labels.numpy())
    expected = 100 * oracle.score(val.numpy(), val_labels.numpy())
    assert knn_accuracy(train, train_labels, val, val_labels, [k])[k]["top1"] == pytest.approx(expected)


def test_top5_and_its_absence_with_few_classes(data):
    train, train_labels, val, val_labels = data
    (scores,) = knn_predict(train, train_labels, val, ks=[50])
    best = scores[50].argsort(dim=1, descending=True)[:, :5]
    expected = 100 * (best == val_labels[:, None]).any(dim=1).float().mean().item()
    assert knn_accuracy(train, train_labels, val, val_labels, [50])[50]["top5"] == pytest.approx(expected)
    assert set(knn_accuracy(train, train_labels % 4, val, val_labels % 4, [50])[50]) == {"top1"}


def nearly_alike(spread):
    """The clusters, as float32 features that only differ in their last digits."""
    train, train_labels, val, val_labels = make_clusters()
    base = 1 + torch.rand(12, generator=torch.Generator().manual_seed(1))
    return (base + spread * train).float(), train_labels, (base + spread * val).float(), val_labels


@pytest.mark.parametrize("spread", [1e-4, 1e-6])
@pytest.mark.parametrize("k", [1, 20])
def test_features_that_are_nearly_alike(spread, k):
    """Cosines then differ by 1e-9 and 1e-13, and float32 resolves 6e-8. The oracle computes in float64."""
    train, train_labels, val, val_labels = nearly_alike(spread)
    assert F.cosine_similarity(train[:1], train).min() > 1 - 1e-6
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    oracle.fit(train.double().numpy(), train_labels.numpy())
    expected = 100 * oracle.score(val.double().numpy(), val_labels.numpy())
    found = knn_accuracy(train, train_labels, val, val_labels, [k])[k]["top1"]
    assert found == pytest.approx(expected, abs=1e-9 if spread > 1e-5 else 100 / 60)
    assert found > 40  # as the clusters themselves; chance is 14
    itself = knn_accuracy(train, train_labels, train, train_labels, [1])
    assert itself[1]["top1"] == 100


def test_a_class_nobody_voted_for_is_no_answer():
    accuracy = knn_accuracy(torch.eye(6), torch.arange(6), torch.eye(6), torch.zeros(6, dtype=torch.long), [1])
    assert accuracy[1]["top1"] == accuracy[1]["top5"] == pytest.approx(100 / 6)


def test_chunks_change_nothing(data, monkeypatch):
    whole = knn_accuracy(*data, [5, 20])
    monkeypatch.setattr(knn, "MAX_VOTES", 7 * 13)
    monkeypatch.setattr(cosine, "MAX_ROWS", 50)
    monkeypatch.setattr(cosine, "MAX_DISTANCES", 50 * 7)
    assert knn_accuracy(*data, [5, 20]) == whole


def test_validation_labels_unknown_to_training_are_wrong_not_an_error(data):
    train, train_labels, val, _ = data
    assert knn_accuracy(train, train_labels, val, torch.full((len(val),), 99), [5])[5] == {"top1": 0.0, "top5": 0.0}


def test_too_many_neighbours(data):
    with pytest.raises(ValueError, match=r"k = 121, 500 is impossible with 120 training images"):
        knn_accuracy(*data, [5, 121, 500])


def test_separable_data_reach_100_percent_and_shuffled_labels_give_chance(data):
    train, train_labels, val, val_labels = data
    assert knn_accuracy(train, train_labels, train, train_labels, [1])[1]["top1"] == 100
    centres = torch.eye(7, 12)
    assert knn_accuracy(centres, torch.arange(7), centres[val_labels], val_labels, [1])[1]["top1"] == 100
    shuffled = val_labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(train, train_labels, val, shuffled, [20])[20]["top1"] == pytest.approx(100 / 7, abs=12)
    assert knn_accuracy(train, train_labels, val, val_labels, [20])[20]["top1"] > 60


def measure_shares():
    train, train_labels, val, val_labels = make_clusters()
    with process_group(find_launch(), torch.device("cpu"), 30):
        return [knn_accuracy(train, train_labels, val[:n], val_labels[:n], [1, 20]) for n in (60, 59, 2)]


def test_three_processes_equal_one():
    assert run_ranks(measure_shares, 3) == [measure_shares()] * 3
