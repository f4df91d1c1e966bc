import math

import pytest
import torch

from dinov2_eq.objectives.koleo import koleo_loss


def test_against_loop():
    torch.manual_seed(0)
    features = torch.randn(6, 5, requires_grad=True)
    normed = features / features.norm(dim=-1, keepdim=True)
    similarity = (normed @ normed.T).tolist()
    expected = 0.0
    for i in range(6):
        nearest = max((j for j in range(6) if j != i), key=similarity[i].__getitem__)
        expected = expected - torch.log((normed[i] - normed[nearest] + 1e-8).norm() + 1e-8)
    expected = expected / 6
    actual = koleo_loss(features)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (actual, expected)))


def test_value_of_opposite_features():
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-0.5, 0.0]])) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("batch", [0, 1])
def test_no_neighbour_gives_zero(batch):
    features = torch.randn(batch, 5, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss == 0 and features.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_duplicates_are_finite(dtype, value):
    features = torch.full((4, 8), value, dtype=dtype, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 10
    if value and dtype != torch.float16:  # the gradient itself does not fit into fp16
        assert features.grad.isfinite().all()


def test_fp32_under_autocast():
    features = torch.randn(32, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = koleo_loss(features)
    assert torch.equal(actual, koleo_loss(features.float()))
