from functools import partial

import pytest
import torch
from torch import nn

from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.models import build_backbone
from dinov2_eq.probes.features import (
    block_features,
    encode_batches,
    encode_together,
    own_share,
    pooled_features,
    require_finite,
    to_unit_range,
)
from tests.processes import run_ranks

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


class Pixels(nn.Module):
    """Stands in for a backbone: each patch token is a normalised pixel, the class token is the brightest one."""

    def forward(self, x, masks=None, is_training=False):
        assert not self.training and is_training
        patches = x.flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": patches.amax(dim=1), "x_norm_patchtokens": patches}


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 4, 4, generator=generator) for size in sizes]


def extract(loader, mode="cls"):
    encode = partial(pooled_features, Pixels().eval(), mean=MEAN, std=STD, mode=mode)
    return encode_batches(encode, loader, torch.device("cpu"))


def test_modes():
    loader = batches(5, 2)
    pixels = ((torch.cat(loader) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).flatten(2)
    torch.testing.assert_close(extract(loader), pixels.amax(2))
    torch.testing.assert_close(extract(loader, "mean"), pixels.mean(2))
    torch.testing.assert_close(extract(loader, "both"), torch.cat([pixels.amax(2), pixels.mean(2)], dim=1))


def test_quarters_are_those_of_the_image():
    images = torch.rand(2, 3, 4, 4)
    pixels = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = [pixels[..., y : y + 2, x : x + 2].mean(dim=(2, 3)) for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(extract([images], "grid2"), torch.cat(expected, dim=1))


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="Unknown feature mode 'patch'"):
        extract(batches(2), mode="patch")


def test_features_can_train_a_head():
    loss = nn.Linear(3, 1)(extract(batches(3))).sum()
    loss.backward()  # inference tensors would refuse


def test_non_finite_features_and_empty_data_are_errors():
    features = torch.rand(6, 3)
    require_finite(features)
    features[4, 0] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 6 images are NaN"):
        require_finite(features)
    with pytest.raises(ValueError, match="no images"):
        extract([])


def test_pooled_features_is_float32():
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert pooled_features(Pixels().eval(), images, mean=MEAN, std=STD).dtype == torch.float32


def test_block_features_are_dinov2s_input_of_the_widest_head():
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", patch_size=8, img_size=16, depth=3, num_register_tokens=2).eval()
    images = torch.rand(2, 3, 16, 16)
    normalized = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        blocks = backbone.get_intermediate_layers(normalized, 2, return_class_token=True)
    expected = torch.cat([blocks[0][1], blocks[1][1], blocks[1][0].mean(dim=1)], dim=1)
    found = block_features(backbone, images, mean=MEAN, std=STD, num_blocks=2)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and not found.requires_grad
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        block_features(backbone, images, mean=MEAN, std=STD, num_blocks=4)


def test_uint8_images_become_fractions():
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit_range(images, torch.device("cpu")), images.float() / 255)
    floats = torch.rand(3)
    assert torch.equal(to_unit_range(floats, torch.device("cpu")), floats)


def numbered_batches(indices, broken=None):
    """Batches of two "images" that hold their own index."""
    for part in torch.as_tensor(indices).split(2):
        images = part[:, None].float()
        images[part == broken] = torch.nan
        yield images


def encode_all(num_images):
    """Returns all features, the own ones, the share, and the error for a NaN in the last image."""
    indices = 3 * torch.arange(num_images).numpy()
    device = torch.device("cpu")
    together = encode_together(torch.square, numbered_batches, indices, device)
    own = encode_together(torch.square, numbered_batches, indices, device, gather=False)
    with pytest.raises(ValueError) as caught:  # in all processes, though one only computes that image
        encode_together(torch.square, lambda some: numbered_batches(some, indices[-1]), indices, device)
    share = own_share(num_images)
    return together.tolist(), own.tolist(), (share.start, share.stop), str(caught.value)


def encode_in_a_process():
    with process_group(find_launch(), torch.device("cpu"), 30):
        return encode_all(7), encode_all(2)


def test_several_processes_compute_what_one_does():
    answers = [encode_in_a_process(), *run_ranks(encode_in_a_process, 3)]
    for number, found in enumerate(answers):
        for num_images, (features, own_features, share, message) in zip((7, 2), found, strict=True):
            assert features == [[float(9 * i * i)] for i in range(num_images)]
            assert own_features == features[slice(*share)]
            assert f"features of 1 of {num_images} images are NaN" in message
            size = num_images if number == 0 else -(-num_images // 3)
            assert share == (max(number - 1, 0) * size, max(number, 1) * size)
