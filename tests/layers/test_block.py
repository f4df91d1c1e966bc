import pytest
import torch

from dinov2_eq.layers.block import Block
from dinov2_eq.layers.drop_path import add_branch
from dinov2_eq.layers.layer_scale import LayerScale
from dinov2_eq.layers.mlp import Mlp
from dinov2_eq.layers.swiglu_ffn import SwiGLUFFN


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_block_is_two_residual_branches(ffn_layer):
    block = Block(16, 2, init_values=0.5, ffn_layer=ffn_layer).eval()
    x = torch.randn(3, 5, 16)
    middle = x + 0.5 * block.attn(block.norm1(x))
    expected = middle + 0.5 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(block.train()(x), expected, atol=1e-6, rtol=0)  # no stochastic depth by default
    torch.testing.assert_close(block(x.transpose(0, 1).contiguous().transpose(0, 1)), expected, atol=1e-6, rtol=0)


def test_block_on_several_groups():
    block = Block(16, 2, init_values=0.5)
    groups = [torch.randn(3, 5, 16), torch.randn(2, 4, 16)]
    flat = torch.cat([group.flatten(0, 1) for group in groups])
    first, second = block(flat, [(3, 5), (2, 4)]).split([15, 8])
    torch.testing.assert_close(first.view(3, 5, 16), block(groups[0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(second.view(2, 4, 16), block(groups[1]), atol=1e-6, rtol=0)


def test_block_without_layer_scale_or_biases():
    names = Block(16, 2, qkv_bias=False, proj_bias=False, ffn_bias=False).state_dict()
    assert {name for name in names if name.endswith("bias")} == {"norm1.bias", "norm2.bias"}
    assert not any("gamma" in name for name in names)


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(10, 0.3, 7), (10, 0.05, 9), (2, 0.3, 1), (1, 0.9, 1), (5, 0.99, 1), (8, 0.5, 4)]
)
def test_stochastic_depth_keeps_a_fixed_count(batch, rate, kept):
    torch.manual_seed(0)
    x, seen = torch.randn(batch * 3 + 8, 4), []

    def branch(tokens, crop_shapes):
        seen.append((tokens, crop_shapes))
        return 2 * tokens + 1

    out = add_branch(x, branch, [(batch, 3), (4, 2)], rate)
    ((tokens, crop_shapes),) = seen
    other_kept = max(int(4 * (1 - rate)), 1)
    assert crop_shapes == [(kept, 3), (other_kept, 2)]
    assert tokens.shape == (kept * 3 + other_kept * 2, 4), "what is dropped is not computed"

    for group, result, k in (
        (x[: batch * 3].view(batch, 3, 4), out[: batch * 3].view(batch, 3, 4), kept),
        (x[batch * 3 :].view(4, 2, 4), out[batch * 3 :].view(4, 2, 4), other_kept),
    ):
        changed = 0
        for before, after in zip(group, result, strict=True):
            if torch.equal(before, after):
                continue
            changed += 1
            torch.testing.assert_close(after, before + len(group) / k * (2 * before + 1))
        assert changed == k


def test_stochastic_depth_is_unbiased_and_governed_by_the_seed():
    x = torch.ones(6, 1)
    outputs = []
    for seed in range(300):
        torch.manual_seed(seed)
        outputs.append(add_branch(x, lambda tokens, _: tokens, [(6, 1)], 0.4))
    torch.testing.assert_close(torch.stack(outputs).mean(0), 2 * x, atol=0.25, rtol=0)
    torch.manual_seed(7)
    assert torch.equal(add_branch(x, lambda tokens, _: tokens, [(6, 1)], 0.4), outputs[7])


def test_no_random_numbers_without_stochastic_depth():
    block, x = Block(16, 2, drop_path_rate=0.5), torch.randn(4, 3, 16)
    before = torch.get_rng_state()
    block.eval()(x)
    add_branch(x.flatten(0, 1), lambda tokens, _: tokens, [(4, 3)], 0.0)
    assert torch.equal(before, torch.get_rng_state())
    block.train()(x)
    assert not torch.equal(before, torch.get_rng_state())


def test_branches_are_drawn_independently():
    block = Block(16, 2, drop_path_rate=0.5).train()
    counts = []
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 16)
        counts.append(sum(torch.equal(before, after) for before, after in zip(x, block(x), strict=True)))
    assert set(counts) == {0, 1, 2}  # samples that neither branch touched


@pytest.mark.parametrize(("dim", "width"), [(1536, 4096), (1024, 2736), (384, 1024), (64, 176)])
def test_swiglu_width(dim, width):
    with torch.device("meta"):
        layer = SwiGLUFFN(dim, 4 * dim)
    assert layer.w12.weight.shape == (2 * width, dim) and layer.w3.weight.shape == (dim, width)


def test_swiglu_gate_is_the_first_half():
    layer, x = SwiGLUFFN(8, 16), torch.randn(3, 8)
    hidden = layer.w12(x)
    gate, value = hidden[:, :16], hidden[:, 16:]
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * value))


def test_mlp_and_layer_scale():
    layer, x = Mlp(8, 16), torch.randn(3, 8)
    hidden = layer.fc1(x)
    exact_gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x), layer.fc2(exact_gelu))
    torch.testing.assert_close(LayerScale(8, 0.25)(x), x / 4)


def test_unknown_ffn_layer():
    with pytest.raises(ValueError, match="Unknown ffn_layer 'moe'; available: mlp, swiglu, swiglufused"):
        Block(16, 2, ffn_layer="moe")
