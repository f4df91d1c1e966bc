import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.layers.batch_norm import SyncBatchNorm


class PatchEmbed(nn.Module):
    """Maps each p x p patch of an image to one token, row by row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = self.grid(img_size, img_size)[0] ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Number of rows and columns of patches of an image.

        Raises:
            ValueError: the image does not split into whole patches.
        """
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"An image of {height} x {width} pixels does not split into patches of {self.patch_size} pixels; "
                "give sides that are multiples of the patch size"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, H, W] -> tokens [B, N, D]."""
        self.grid(*images.shape[-2:])
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvPatchEmbed(PatchEmbed):
    """Convolutions of stride 2 make the tokens, which lets small transformers learn sooner (arXiv 2106.14881).

    log2(patch_size) convolutions of 3 x 3 with batch normalisation and ReLU, each twice as wide as the one before it,
    then one of 1 x 1.

    Raises:
        ValueError: a patch size that is no power of two.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        num_convs = round(math.log2(patch_size))
        if 2**num_convs != patch_size or num_convs < 1:
            raise ValueError(
                f"student.patch_embed=conv halves the image again and again, so student.patch_size={patch_size} must "
                "be a power of two: 2, 4, 8, 16"
            )
        super().__init__(img_size, patch_size, in_chans, embed_dim)
        widths = [in_chans, *(max(embed_dim >> (num_convs - 1 - level), 8) for level in range(num_convs))]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, stride=2, padding=1, bias=False) for pair in pairwise(widths))
        self.norms = nn.ModuleList(SyncBatchNorm(width) for width in widths[1:])
        self.proj = nn.Conv2d(widths[-1], embed_dim, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        self.grid(*images.shape[-2:])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = F.relu(norm(conv(images)))
        return self.proj(images).flatten(2).transpose(1, 2)


PATCH_EMBEDS = {"linear": PatchEmbed, "conv": ConvPatchEmbed}
