"""Decoders D_k, from the equivariant tokens of two views to one intermediate image (arXiv 2503.18753, section 3).

All decoders are built from `DecoderSettings` and have one signature, `decoder(anchor, transformed, grid) -> image`:
tokens [B, N, D_equi] of the two views, the token grid (h, w) with h * w = N, and an image
[B, 3, h * patch_size, w * patch_size] in normalised pixel values.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.layers.block import Block
from dinov2_eq.layers.cross_attention import CrossAttention

NUM_CONVOLUTIONS = 4  # as in the paper
HEAD_DIM = 64


@dataclass(frozen=True)
class DecoderSettings:
    """Settings of all decoders; each reads those it needs."""

    equivariant_dim: int
    patch_size: int
    dim: int  # width after the first layer
    depth: int  # self-attention layers
    attention: str = "auto"  # backend of attention layers


class ConvDecoder(nn.Module):
    """One linear layer on the tokens of both views, patch by patch, then four convolutions that grow to the image.

    The growth is spread evenly: each convolution enlarges the map by patch_size ** (1/4).
    """

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.patch_size = settings.patch_size
        self.linear = nn.Linear(2 * settings.equivariant_dim, settings.dim)
        widths = [max(settings.dim // 2**level, 8) for level in range(NUM_CONVOLUTIONS)] + [3]
        # Zero padding would draw a grey frame around every image.
        self.convs = nn.ModuleList(
            nn.Conv2d(*pair, kernel_size=3, padding=1, padding_mode="replicate") for pair in pairwise(widths)
        )

    def init_weights(self) -> None:
        for layer in (self.linear, *self.convs):
            layer.reset_parameters()

    def forward(self, anchor: Tensor, transformed: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.linear(torch.cat([anchor, transformed], dim=-1))  # [B, N, D]
        maps = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
        for level, conv in enumerate(self.convs, start=1):
            growth = self.patch_size ** (level / NUM_CONVOLUTIONS)
            size = [round(side * growth) for side in grid]
            maps = conv(F.interpolate(F.gelu(maps), size=size, mode="bilinear", align_corners=False))
        return maps


class SelfAttentionDecoder(nn.Module):
    """One linear layer on the tokens of both views, patch by patch, then `depth` self-attention layers and one linear
    layer to pixels (ours: the first layer of `ConvDecoder`, the last ones of `CrossAttentionDecoder`)."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        dim, attention = settings.dim, settings.attention
        if dim % HEAD_DIM:
            raise ValueError(
                f"equivariance.decoder_dim={dim}: decoders with attention have heads of {HEAD_DIM} channels; "
                f"give a multiple of {HEAD_DIM}"
            )
        self.patch_size = settings.patch_size
        self.add_first_layers(settings, dim // HEAD_DIM)
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_DIM, backend=attention) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, 3 * self.patch_size**2)

    def add_first_layers(self, settings: DecoderSettings, num_heads: int) -> None:
        """Adds the layers of `join`."""
        self.linear = nn.Linear(2 * settings.equivariant_dim, settings.dim)

    def join(self, anchor: Tensor, transformed: Tensor) -> Tensor:
        """Returns one token for each patch from those of the two views, [B, N, D]."""
        return self.linear(torch.cat([anchor, transformed], dim=-1))

    def stages(self) -> nn.ModuleList:
        """Returns the parts to shard and to compile, as a backbone does."""
        return self.blocks

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, anchor: Tensor, transformed: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.join(anchor, transformed)
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.pixels(self.norm(tokens))  # [B, N, 3 p p]
        # Each token's vector is one p x p patch: fold puts them side by side.
        size = [side * self.patch_size for side in grid]
        return F.fold(patches.transpose(1, 2), size, kernel_size=self.patch_size, stride=self.patch_size)


class CrossAttentionDecoder(SelfAttentionDecoder):
    """One cross-attention layer (queries: transformed view; keys and values: anchor view), `depth` self-attention
    layers, one linear layer to pixels (the structure of arXiv 2412.03314; the sizes are ours)."""

    def add_first_layers(self, settings: DecoderSettings, num_heads: int) -> None:
        dim = settings.dim
        self.linear = nn.Linear(settings.equivariant_dim, dim)
        self.query_norm, self.context_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.cross_attention = CrossAttention(dim, num_heads, backend=settings.attention)

    def join(self, anchor: Tensor, transformed: Tensor) -> Tensor:
        anchor, queries = self.linear(anchor), self.linear(transformed)  # [B, N, D]
        return queries + self.cross_attention(self.query_norm(queries), self.context_norm(anchor))


DECODERS = {
    "conv": ConvDecoder,
    "cross_attention": CrossAttentionDecoder,
    "self_attention": SelfAttentionDecoder,
}


def build_decoder(name: str, **settings) -> nn.Module:
    """Builds the decoder called `name` with the given `DecoderSettings`.

    Raises:
        ValueError: unknown name, or a width that the decoder cannot have.
    """
    if name not in DECODERS:
        raise ValueError(f"equivariance.decoder={name!r}: unknown decoder; available: {', '.join(DECODERS)}")
    return DECODERS[name](DecoderSettings(**settings))
