from torch import Tensor, nn


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
