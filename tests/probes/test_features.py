import pytest
import torch
from torch import nn

from dinov2_eq.probes.features import extract_features, pooled_features

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


class Pixels(nn.Module):
    """Stands in for a backbone: each patch token is a normalised pixel, the class token is the brightest one."""

    def forward(self, x, masks=None, is_training=False):
        assert not self.training and is_training
        patches = x.flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": patches.amax(dim=1), "x_norm_patchtokens": patches}


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(size, 3, 4, 4, generator=generator), torch.arange(size)) for size in sizes]


def extract(loader, mode="cls", backbone=None):
    return extract_features(backbone or Pixels(), loader, mean=MEAN, std=STD, device=torch.device("cpu"), mode=mode)


def test_modes():
    loader = batches(5, 2)
    images = torch.cat([images for images, _ in loader])
    pixels = ((images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).flatten(2)
    features, labels = extract(loader)
    torch.testing.assert_close(features, pixels.amax(2))
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    torch.testing.assert_close(extract(loader, "mean")[0], pixels.mean(2))
    torch.testing.assert_close(extract(loader, "both")[0], torch.cat([pixels.amax(2), pixels.mean(2)], dim=1))


def test_mode_of_the_backbone_is_restored_also_after_an_error():
    backbone = Pixels()
    extract(batches(2), backbone=backbone)
    assert backbone.training
    with pytest.raises(ValueError, match="Unknown feature mode 'patch'"):
        extract(batches(2), mode="patch", backbone=backbone)
    assert backbone.training


def test_features_can_train_a_head():
    features, _ = extract(batches(3))
    loss = nn.Linear(3, 1)(features).sum()
    loss.backward()  # inference tensors would refuse


def test_non_finite_features_and_empty_data_are_errors():
    broken = batches(3, 3)
    broken[1][0][1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 6 images are NaN"):
        extract(broken)
    with pytest.raises(ValueError, match="no images"):
        extract([])


def test_pooled_features_is_float32():
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert pooled_features(Pixels().eval(), images, mean=MEAN, std=STD).dtype == torch.float32
