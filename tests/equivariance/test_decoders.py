"""Split, decoders and loss."""

import pytest
import torch

from dinov2_eq.equivariance.decoders import DECODERS, build_decoder
from dinov2_eq.equivariance.split import NoSplit, TokenSplit
from dinov2_eq.objectives.reconstruction import reconstruction_loss


def decoder_of(name, patch_size=8, dim=64):
    decoder = build_decoder(name, equivariant_dim=24, patch_size=patch_size, dim=dim, depth=2)
    torch.manual_seed(0)
    decoder.init_weights()
    return decoder


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("patch_size", [4, 8, 14, 16])
def test_image_size(name, patch_size):
    anchor, transformed = torch.randn(2, 2, 3 * 5, 24)
    image = decoder_of(name, patch_size)(anchor, transformed, (3, 5))
    assert image.shape == (2, 3, 3 * patch_size, 5 * patch_size)


@pytest.mark.parametrize("name", DECODERS)
def test_both_views_matter_and_get_gradients(name):
    anchor, transformed = torch.randn(2, 2, 16, 24).requires_grad_(), torch.randn(2, 16, 24)
    anchor, transformed = (view.detach().requires_grad_() for view in (anchor[0], transformed))
    decoder = decoder_of(name)
    decoder(anchor, transformed, (4, 4)).square().mean().backward()
    assert anchor.grad.abs().sum() > 0 and transformed.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in decoder.parameters())


@pytest.mark.parametrize("name", ["cross_attention", "self_attention"])
def test_attention_puts_each_patch_in_its_place(name):
    """A change in the transformed view's token of one patch changes that patch most."""
    decoder = decoder_of(name).eval()
    anchor, transformed = torch.randn(2, 1, 12, 24)
    changed = transformed.clone()
    changed[0, 7] += 3.0  # row 1, column 3 of a 3 x 4 grid
    difference = (decoder(anchor, changed, (3, 4)) - decoder(anchor, transformed, (3, 4))).abs().mean(1)
    per_patch = difference.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))[0]
    assert per_patch.flatten().argmax() == 7


def test_decoder_learns_one_pair():
    torch.manual_seed(0)
    for name in DECODERS:
        decoder = decoder_of(name)
        anchor, transformed = torch.randn(2, 2, 16, 24)
        target = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), size=32, mode="bilinear")
        optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
        for _ in range(60):
            loss = reconstruction_loss(decoder(anchor, transformed, (4, 4)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5 * target.square().mean()


def test_errors():
    with pytest.raises(ValueError, match="unknown decoder; available: conv, cross_attention, self_attention"):
        decoder_of("mlp")
    for name in ("cross_attention", "self_attention"):
        with pytest.raises(ValueError, match=r"decoder_dim=100.*multiple of 64"):
            decoder_of(name, dim=100)


def test_loss_equals_the_slow_loop():
    predicted, target = torch.randn(2, 3, 4, 3, 8, 8)
    slow = sum(((predicted[k] - target[k]) ** 2).mean() for k in range(3)) / 3
    torch.testing.assert_close(reconstruction_loss(predicted, target), slow)
    assert reconstruction_loss(predicted.bfloat16(), target).dtype == torch.float32


def test_predicting_the_mean_costs_one():
    normalised = torch.randn(2, 4, 3, 64, 64)
    assert reconstruction_loss(torch.zeros_like(normalised), normalised) == pytest.approx(1, abs=0.02)


def test_split_is_one_projection_cut_in_two():
    split = TokenSplit(dim=16, invariant_dim=32, equivariant_dim=8)
    split.init_weights()
    weight = torch.cat([split.invariant.weight, split.equivariant.weight])
    bias = torch.cat([split.invariant.bias, split.equivariant.bias])
    tokens = torch.randn(2, 5, 16)
    parts = [split.invariant(tokens), split.equivariant(tokens)]
    assert [part.shape[-1] for part in parts] == [32, 8]
    torch.testing.assert_close(torch.cat(parts, dim=-1), torch.nn.functional.linear(tokens, weight, bias))


def test_the_invariant_part_may_be_the_whole_token():
    split, tokens = TokenSplit(dim=16, invariant_dim=None, equivariant_dim=8), torch.randn(2, 5, 16)
    split.init_weights()
    assert split.invariant(tokens) is tokens and split.equivariant(tokens).shape == (2, 5, 8)
    assert split.equivariant.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_no_split_hands_tokens_on():
    tokens = torch.randn(2, 5, 16)
    assert NoSplit().invariant(tokens) is tokens
