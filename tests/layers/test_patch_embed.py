import pytest
import torch

from dinov2_eq.layers.patch_embed import PatchEmbed


def test_patches_go_row_by_row():
    layer = PatchEmbed(img_size=8, patch_size=4, in_chans=3, embed_dim=5)
    images = torch.randn(2, 3, 8, 12)
    tokens = layer(images)
    assert layer.num_patches == 4 and layer.grid(8, 12) == (2, 3) and tokens.shape == (2, 6, 5)
    weight = layer.proj.weight.flatten(1)  # [D, 3 p p]
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
            torch.testing.assert_close(tokens[:, 3 * row + column], patch @ weight.T + layer.proj.bias)


@pytest.mark.parametrize("size", [(8, 10), (7, 8), (0, 8)])
def test_images_of_other_sizes(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels does not split into patches of 4 pixels"):
        PatchEmbed(8, 4, 3, 5)(torch.zeros(1, 3, *size))
