import pytest
import torch

from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.data.linear_loader import make_whole_image_loader
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.evaluation.features import FeatureExtractor
from dinov2_eq.probes.features import block_features, pooled_features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    (found,) = read_labelled("Shapes:num=12:size=80", [], "test", max_images=7)
    return found


@pytest.mark.parametrize("make_loader", [make_eval_loader, make_whole_image_loader])
def test_features_are_those_of_the_chosen_images_in_order(images, make_loader):
    """At 72 pixels the two loaders show different parts."""
    encoder = load_encoder("random:vit_tiny/8@72")
    extractor = FeatureExtractor(encoder, CPU, batch_size=3, num_workers=0, make_loader=make_loader)
    (pixels,) = make_loader(images.dataset, images.indices, 72, 7)
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
    normalisation = {"mean": encoder.mean, "std": encoder.std}
    expected = pooled_features(encoder.backbone, pixels, mode="both", **normalisation)
    torch.testing.assert_close(extractor.pooled(images, "both"), expected)
    expected = block_features(encoder.backbone, pixels, num_blocks=2, **normalisation)
    torch.testing.assert_close(extractor.own_blocks(images, 2), expected)


def test_half_precision_is_close_and_not_the_same(images):
    encoder = load_encoder("random:vit_tiny/8@32")
    full, half = (
        FeatureExtractor(encoder, CPU, batch_size=4, num_workers=0, half_precision=value).pooled(images)
        for value in (False, True)
    )
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.1, atol=0.1)
