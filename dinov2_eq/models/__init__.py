"""Backbones by name."""

from typing import NamedTuple

from dinov2_eq.models.vision_transformer import DinoVisionTransformer

__all__ = ["ARCHS", "DinoVisionTransformer", "build_backbone"]


class Arch(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int
    ffn_layer: str = "mlp"


ARCHS = {
    "vit_tiny": Arch(192, 12, 3),
    "vit_small": Arch(384, 12, 6),
    "vit_base": Arch(768, 12, 12),
    "vit_large": Arch(1024, 24, 16),
    "vit_giant2": Arch(1536, 40, 24, "swiglu"),
}


def build_backbone(
    arch: str,
    *,
    patch_size: int,
    img_size: int,
    depth: int | None = None,
    drop_path_rate: float = 0.0,
    drop_path_uniform: bool = True,
    layerscale: float = 1e-5,
    ffn_layer: str | None = None,
    qkv_bias: bool = True,
    proj_bias: bool = True,
    ffn_bias: bool = True,
    num_register_tokens: int = 0,
    interpolate_antialias: bool = False,
    interpolate_offset: float = 0.1,
    attention: str = "auto",
) -> DinoVisionTransformer:
    """A backbone of the table `ARCHS`; see `DinoVisionTransformer` for the arguments.

    Args:
        depth: number of blocks; None: the architecture's own.
        layerscale: initial LayerScale; 0 builds none.
        ffn_layer: "mlp" or "swiglu"; None: the architecture's own.

    Raises:
        ValueError: unknown architecture, or an argument that `DinoVisionTransformer` refuses.
    """
    if arch not in ARCHS:
        raise ValueError(f"Unknown architecture {arch!r}; available: {', '.join(ARCHS)}")
    defaults = ARCHS[arch]
    return DinoVisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=defaults.embed_dim,
        depth=defaults.depth if depth is None else depth,
        num_heads=defaults.num_heads,
        qkv_bias=qkv_bias,
        ffn_bias=ffn_bias,
        proj_bias=proj_bias,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=drop_path_uniform,
        init_values=layerscale,
        ffn_layer=defaults.ffn_layer if ffn_layer is None else ffn_layer,
        num_register_tokens=num_register_tokens,
        interpolate_antialias=interpolate_antialias,
        interpolate_offset=interpolate_offset,
        attention=attention,
    )
