"""ResNets against torchvision's own forward, and what training asks of them."""

import pytest
import torch
import torchvision

from dinov2_eq.models import build_backbone


@pytest.fixture(params=["resnet18", "resnet50"])
def pair(request):
    """A backbone and torchvision's model with the same weights."""
    backbone = build_backbone(request.param, img_size=64).eval()
    theirs = getattr(torchvision.models, request.param)().eval()
    misfit = theirs.load_state_dict(backbone.state_dict(), strict=False)
    assert misfit.missing_keys == ["fc.weight", "fc.bias"] and not misfit.unexpected_keys
    theirs.fc = torch.nn.Identity()
    return backbone, theirs


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (40, 70)])
def test_the_class_token_is_torchvisions_output(pair, size):
    backbone, theirs = pair
    images = torch.randn(2, 3, *size)
    features = backbone(images, is_training=True)
    torch.testing.assert_close(features["x_norm_clstoken"], theirs(images))
    torch.testing.assert_close(features["x_norm_patchtokens"].mean(1), theirs(images))
    torch.testing.assert_close(backbone([images, images[:1]])[1], theirs(images[:1]))


def test_stages(pair):
    backbone, theirs = pair
    images = torch.randn(2, 3, 64, 64)
    maps = {}
    for number in range(1, 5):
        stage = getattr(theirs, f"layer{number}")
        stage.register_forward_hook(lambda _, __, output, number=number: maps.update({number - 1: output}))
    theirs(images)
    for number, output in enumerate(backbone.get_intermediate_layers(images, 4, reshape=True)):
        torch.testing.assert_close(output, maps[number])
    ((patches, cls),) = backbone.get_intermediate_layers(images, [2], return_class_token=True)
    torch.testing.assert_close(patches, maps[2].flatten(2).transpose(1, 2))
    torch.testing.assert_close(cls, maps[2].mean((2, 3)))
    with pytest.raises(ValueError, match=r"n=5 .* has 4, numbered 0 to 3"):
        backbone.get_intermediate_layers(images, 5)


def test_every_parameter_is_of_a_layer(pair):
    backbone, _ = pair
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3, 4}
    assert layers["conv1.weight"] == 0 and layers["layer4.1.bn2.bias"] == 4
    assert backbone.is_patch_embed("conv1.weight") and not backbone.is_patch_embed("layer1.0.conv1.weight")


def test_batch_normalisation_starts_right(pair):
    for name, buffer in pair[0].named_buffers():
        assert (buffer == (1 if name.endswith("running_var") else 0)).all(), name


def test_masks_are_refused(pair):
    with pytest.raises(ValueError, match=r"has no mask token.*ibot.loss_weight=0"):
        pair[0](torch.randn(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.bool))
