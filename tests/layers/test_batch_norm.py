"""Batch normalisation of two processes against torch's on one, with unequal shares."""

import pytest
import torch
from torch import nn

from dinov2_eq.layers.batch_norm import SyncBatchNorm
from dinov2_eq.layers.projector import build_projector
from tests.processes import run_ranks

SHARES = (slice(0, 5), slice(5, 8))


def inputs(ndim):
    return torch.randn(8, 3, *[4] * (ndim - 2), generator=torch.Generator().manual_seed(0)) * 2 + 1


def normalised_share(ndim):
    torch.distributed.init_process_group("gloo")
    layer = SyncBatchNorm(3)
    x = inputs(ndim)[SHARES[torch.distributed.get_rank()]].requires_grad_()
    y = layer(x)
    (y * y.detach().exp()).sum().backward()
    torch.distributed.all_reduce(layer.weight.grad)
    arrays = (y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var)
    layer.eval()
    return [tensor.numpy() for tensor in (*arrays, layer(x).detach())]


@pytest.mark.parametrize("ndim", [2, 4])
def test_two_processes_equal_torch_on_one(ndim):
    layer, x = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[ndim](3), inputs(ndim).requires_grad_()
    y = layer(x)
    (y * y.detach().exp()).sum().backward()
    expected = (y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var)
    layer.eval()
    expected = (*expected, layer(x).detach())
    first, second = run_ranks(normalised_share, 2, ndim)
    for number, (ours, theirs, whole) in enumerate(zip(first, second, expected, strict=True)):
        joined = torch.cat([torch.from_numpy(ours), torch.from_numpy(theirs)]) if number in (0, 1, 5) else None
        found = torch.from_numpy(ours) if joined is None else joined
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_a_projector_ends_without_bias_and_normalisation():
    projector = build_projector([4, 8, 8, 2])
    assert [type(layer) for layer in projector] == [
        *[nn.Linear, SyncBatchNorm, nn.ReLU] * 2,
        nn.Linear,
    ]
    assert projector[-1].bias is None and projector[0].bias is not None
    assert projector(torch.randn(3, 4)).shape == (3, 2)
