import pytest
import torch

from dinov2_eq.probes.invariance import mean_cosine, mean_cosine_of_others, recall_at_1


def test_cosines_of_known_vectors():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert mean_cosine(first, second) == pytest.approx(0.5)
    assert mean_cosine_of_others(first) == pytest.approx(0.0, abs=1e-12)
    assert mean_cosine_of_others(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1 / 3)


def test_cosine_of_others_equals_a_slow_loop():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine_of_others(rows) == pytest.approx(torch.stack(pairs).mean().item())


def test_one_image_has_no_others():
    with pytest.raises(ValueError, match="give more images"):
        mean_cosine_of_others(torch.ones(1, 3))


def test_features_that_never_change():
    same = torch.randn(1, 7).repeat(50, 1)
    assert mean_cosine(same, same) == pytest.approx(1.0)
    assert mean_cosine_of_others(same) == pytest.approx(1.0)
    assert recall_at_1(same, same) == pytest.approx(1 / 50)


def test_recall_counts_the_own_row_only():
    gallery = torch.eye(4)
    assert recall_at_1(3 * gallery, gallery) == 1.0
    assert recall_at_1(gallery[[1, 0, 2, 3]], gallery) == 0.5


def test_recall_shares_what_is_equally_near():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert recall_at_1(gallery, gallery) == pytest.approx((0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize("spread", [1e-5, 1e-7, 1e-9])
def test_recall_sees_differences_that_cosines_do_not(spread):
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gallery = 1 + spread * noise
    assert recall_at_1(gallery, gallery) == 1.0
    assert recall_at_1(gallery + 0.1 * spread * noise.roll(1, dims=0), gallery) == 1.0


def test_chunks_change_nothing(monkeypatch):
    queries, gallery = torch.randn(2, 23, 6, generator=torch.Generator().manual_seed(0))
    whole = recall_at_1(queries, gallery)
    monkeypatch.setattr("dinov2_eq.probes.invariance.MAX_DISTANCES", 4 * 23)
    assert recall_at_1(queries, gallery) == whole
