import numpy as np

from dinov2_eq.report.feature_maps import ANGLES_DEG, turned_maps


def patch_colors(images: np.ndarray) -> np.ndarray:
    """Equivariant tokens [B, h, w, 3]: the mean colour of each 4-pixel patch."""
    batch, height, width, _ = images.shape
    return images.reshape(batch, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))


def patch_positions(images: np.ndarray) -> np.ndarray:
    """Tokens [B, h, w, 3] that know only their place in the frame."""
    side = images.shape[1] // 4
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.broadcast_to(np.stack([x, y, x * y], axis=-1), (len(images), side, side, 3))


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def test_map_of_equivariant_features_turns_with_the_image() -> None:
    for turned in turned_maps(IMAGES, patch_colors):
        upright, quarter = turned.maps[ANGLES_DEG.index(0)], turned.maps[ANGLES_DEG.index(90)]
        np.testing.assert_allclose(np.rot90(upright).astype(int), quarter, atol=1)
        np.testing.assert_array_equal(np.rot90(turned.images[0]), turned.images[2])


def test_map_of_positions_stays_in_place() -> None:
    for turned in turned_maps(IMAGES, patch_positions):
        np.testing.assert_array_equal(turned.maps[0], turned.maps[2])


def test_same_disc_at_every_angle() -> None:
    turned = turned_maps(IMAGES, patch_colors)[0]
    for pictures in turned:
        alpha = pictures[..., 3]
        assert set(np.unique(alpha)) == {0, 255}
        assert (alpha == alpha[0]).all() and alpha[0, 0, 0] == 0
