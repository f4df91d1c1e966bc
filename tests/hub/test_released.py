"""The released weights in the checkout are small and complete, and match the manifest."""

import pytest
import torch

from dinov2_eq.files import file_sha256
from dinov2_eq.hub import ENTRY_POINTS
from dinov2_eq.hub.manifest import read_manifest
from tests.hub.conftest import ROOT

WEIGHTS = ROOT / "weights"
RELEASES = read_manifest(WEIGHTS)


def test_every_file_is_listed():
    assert {path.name for path in WEIGHTS.glob("*.safetensors")} == {release.file for release in RELEASES.values()}


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASES)
def test_it_loads_and_is_what_the_manifest_says(name):
    release = RELEASES[name]
    file = WEIGHTS / release.file
    assert (release.size, release.sha256) == (file.stat().st_size, file_sha256(file)) and release.size < 12e6
    assert release.data and release.notes and release.results and release.licence
    model = ENTRY_POINTS[release.entry_point](weights=name, projection="projection" in release.contains)
    size = model.preprocessing["image_size"]
    features = model(torch.randn(2, 3, size, size + 16, generator=torch.Generator().manual_seed(0)))
    for part in features if isinstance(features, tuple) else [features]:
        assert part.isfinite().all() and part.std() > 0.01


@torch.no_grad()
def test_pretrained_from_a_checkout():
    """Loads it as in the README."""
    model = torch.hub.load(str(ROOT), "dinov2_eq_vitt8", source="local", pretrained=True)
    (default,) = (name for name, release in RELEASES.items() if release.default)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), ENTRY_POINTS["dinov2_eq_vitt8"](weights=default)(images))
