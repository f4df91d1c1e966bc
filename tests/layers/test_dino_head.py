import warnings

import pytest
import torch

from dinov2_eq.layers.dino_head import DINOHead


def test_state_dict_names_and_shapes():
    with torch.device("meta"):
        head = DINOHead(384, 65536)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (65536, 1),
        "last_layer.weight_v": (65536, 256),
    }


@pytest.mark.parametrize(
    ("nlayers", "names"),
    [(1, ["mlp.weight", "mlp.bias"]), (2, ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"])],
)
def test_fewer_layers(nlayers, names):
    head = DINOHead(8, 12, nlayers=nlayers, hidden_dim=16, bottleneck_dim=4)
    assert [name for name in head.state_dict() if name.startswith("mlp")] == names
    assert head(torch.randn(2, 3, 8)).shape == (2, 3, 12)


def test_against_torch_weight_norm():
    head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=4)
    torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old function is the oracle; it warns that it is old
        oracle = torch.nn.utils.weight_norm(torch.nn.Linear(4, 12, bias=False))
    oracle.load_state_dict(head.last_layer.state_dict())
    x = torch.randn(5, 8)
    bottleneck = head.mlp(x)
    expected = oracle(bottleneck / bottleneck.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(head(x), expected)
    weights = (head.last_layer.weight_g, head.last_layer.weight_v)
    actual_gradients = torch.autograd.grad(head(x).square().sum(), weights)
    expected_gradients = torch.autograd.grad(expected.square().sum(), (oracle.weight_g, oracle.weight_v))
    torch.testing.assert_close(actual_gradients, expected_gradients, atol=1e-5, rtol=1e-4)


def test_logits_start_within_one():
    assert DINOHead(8, 100, hidden_dim=16, bottleneck_dim=4)(10 * torch.randn(50, 8)).abs().max() <= 1 + 1e-6


def test_init_weights_sets_every_parameter_after_meta():
    with torch.device("meta"):
        head = DINOHead(64, 100, hidden_dim=64, bottleneck_dim=16)
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        parameter.data.fill_(torch.nan)
    head.init_weights()
    for name, parameter in head.named_parameters():
        assert parameter.isfinite().all(), name
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(16**-0.5, rel=0.05)


def test_no_warnings_and_all_gradients():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=4)
        head(torch.randn(0, 8))
        head(torch.randn(5, 8)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_no_layers():
    with pytest.raises(ValueError, match="nlayers=0"):
        DINOHead(8, 12, nlayers=0)
