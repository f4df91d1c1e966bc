import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from dinov2_eq.probes import cosine
from dinov2_eq.probes.cosine import cosine_distances, directions, mean_direction, nearest_neighbours

DIM = 48


def rows(number, spread, seed, dtype=torch.float32):
    """Random features around one vector that all share."""
    shared = 1 + torch.rand(DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(number, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (shared + spread * noise).to(dtype)


def exact_distances(queries, gallery):
    """|a - b|^2 / 2 from the differences themselves, of unit vectors in twice the usual precision."""
    first, second = (features.double().numpy().astype("longdouble") for features in (queries, gallery))
    first, second = (features / (features**2).sum(1, keepdims=True) ** 0.5 for features in (first, second))
    return torch.from_numpy(((first[:, None] - second[None]) ** 2).sum(2).astype("float64") / 2)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-7, 1e-9])
def test_distances_are_exact_however_alike_the_features_are(spread):
    queries, gallery = rows(30, spread, 0, torch.float64), rows(40, spread, 1, torch.float64)
    centre = mean_direction(gallery)
    found = cosine_distances(directions(queries, centre), directions(gallery, centre))
    torch.testing.assert_close(found, exact_distances(queries, gallery), rtol=1e-12 + 1e-15 / spread, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-7])
def test_neighbours_are_scikit_learns(spread, dtype):
    """In float64, and up to the rounding of scikit-learn's own cosines, which makes ties at a spread of 1e-7."""
    queries, gallery = rows(50, spread, 0, dtype), rows(300, spread, 1, dtype)
    distances, indices = nearest_neighbours(queries, gallery, 20)
    oracle = NearestNeighbors(n_neighbors=20, metric="cosine").fit(gallery.double().numpy())
    expected, _ = oracle.kneighbors(queries.double().numpy())
    torch.testing.assert_close(distances, torch.from_numpy(expected), rtol=0, atol=2e-15)
    exact = exact_distances(queries, gallery)
    torch.testing.assert_close(exact.gather(1, indices), exact.topk(20, largest=False).values, rtol=1e-9, atol=0)


def test_duplicates_are_as_near_as_each_other():
    gallery = rows(60, 1e-6, 0).repeat(3, 1)
    distances, indices = nearest_neighbours(gallery[:60], gallery, 3)
    assert indices.sort().values.tolist() == [[row, row + 60, row + 120] for row in range(60)]
    assert (distances < 1e-24).all()


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-6])
def test_every_row_finds_itself(spread):
    gallery = rows(200, spread, 0)
    assert len(gallery.unique(dim=0)) == 200
    _, indices = nearest_neighbours(gallery, gallery, 1)
    assert indices.flatten().tolist() == list(range(200))


def test_lengths_do_not_matter():
    queries, gallery = rows(10, 1.0, 0), rows(20, 1.0, 1)
    expected = 1 - F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    distances, indices = nearest_neighbours(7 * queries, 0.1 * gallery, 20)
    torch.testing.assert_close(distances, expected.gather(1, indices), rtol=1e-6, atol=1e-6)


def test_parts_change_nothing(monkeypatch):
    queries, gallery = rows(23, 1e-5, 0), rows(57, 1e-5, 1)
    whole = nearest_neighbours(queries, gallery, 30)
    monkeypatch.setattr(cosine, "MAX_ROWS", 10)
    monkeypatch.setattr(cosine, "MAX_DISTANCES", 40)
    distances, indices = nearest_neighbours(queries, gallery, 30)
    torch.testing.assert_close(distances, whole[0], rtol=1e-9, atol=0)
    assert torch.equal(indices, whole[1])


def test_no_queries():
    """No queries at all, as the last of many processes may have."""
    distances, indices = nearest_neighbours(torch.empty(0, DIM), rows(5, 1.0, 0), 2)
    assert distances.shape == indices.shape == (0, 2)
