from dinov2_eq.layers.attention import Attention
from dinov2_eq.layers.block import Block
from dinov2_eq.layers.cross_attention import CrossAttention
from dinov2_eq.layers.dino_head import DINOHead
from dinov2_eq.layers.patch_embed import PatchEmbed

__all__ = ["Attention", "Block", "CrossAttention", "DINOHead", "PatchEmbed"]
