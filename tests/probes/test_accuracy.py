import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from dinov2_eq.probes import accuracy
from dinov2_eq.probes.accuracy import count_hits


@pytest.fixture
def data():
    """Two classifiers of 7 classes in 9 dimensions, and 200 images; class 5 has none."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 7, 9, generator=generator), torch.randn(2, 7, generator=generator)
    labels = torch.randint(6, (200,), generator=generator)
    labels[labels == 5] = 6
    features = weight[0, labels] + 2 * torch.randn(200, 9, generator=generator)
    return weight, bias, features, labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("classifier", [0, 1])
def test_equals_scikit_learn(data, classifier):
    weight, bias, features, labels = data
    scores = (features @ weight[classifier].T + bias[classifier]).numpy()
    truth, answers = labels.numpy(), scores.argmax(axis=1)
    hits = count_hits(*data)
    found = hits.summary(classifier, "per_class_accuracy")
    assert found["mean_accuracy"]["top1"] == pytest.approx(100 * accuracy_score(truth, answers))
    assert found["mean_accuracy"]["top5"] == pytest.approx(
        100 * top_k_accuracy_score(truth, scores, k=5, labels=np.arange(7))
    )
    balanced = 100 * balanced_accuracy_score(truth, answers)
    assert found["mean_per_class_accuracy"]["top1"] == pytest.approx(balanced)
    by_class = found["per_class_accuracy"]["top1"]
    assert by_class.pop(5) is None
    present = [0, 1, 2, 3, 4, 6]
    assert by_class == pytest.approx((100 * recall_score(truth, answers, labels=present, average=None)).tolist())
    assert hits.top1_percent("mean_accuracy")[classifier].item() == pytest.approx(found["mean_accuracy"]["top1"])
    for metric in ("mean_per_class_accuracy", "per_class_accuracy"):
        assert hits.top1_percent(metric)[classifier].item() == pytest.approx(balanced)


def test_chunks_and_several_classifiers_change_nothing(data, monkeypatch):
    whole = count_hits(*data)
    monkeypatch.setattr(accuracy, "MAX_SCORES", 14 * 30)
    assert all(torch.equal(one, other) for one, other in zip(count_hits(*data), whole, strict=True))
    weight, bias, *rest = data
    assert torch.equal(count_hits(weight[1:], bias[1:], *rest).top1, whole.top1[1:])


def test_no_images_and_few_classes(data):
    weight, bias, features, labels = data
    assert count_hits(weight, bias, features[:0], labels[:0]).total.sum() == 0
    hits = count_hits(weight[:, :3], bias[:, :3], features[labels < 3], labels[labels < 3])
    assert set(hits.summary(0, "mean_accuracy")["mean_accuracy"]) == {"top1"}
    assert "per_class_accuracy" not in hits.summary(0, "mean_accuracy")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_classifier_is_wrong(data, value):
    weight, bias, features, labels = data
    weight = weight.clone()
    weight[1] = value
    hits = count_hits(weight, bias, features, torch.zeros_like(labels))
    assert hits.top1[1].sum() == hits.top5[1].sum() == 0 < hits.top1[0].sum()
