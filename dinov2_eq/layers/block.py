from torch import Tensor, nn

from dinov2_eq.layers.attention import Attention, CropShapes
from dinov2_eq.layers.drop_path import add_branch
from dinov2_eq.layers.layer_scale import LayerScale
from dinov2_eq.layers.mlp import Mlp
from dinov2_eq.layers.swiglu_ffn import SwiGLUFFN

FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLUFFN, "swiglufused": SwiGLUFFN}  # DINOv2's configs say "swiglufused"


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward layer, each with LayerScale and stochastic depth.

    Raises:
        ValueError: unknown `ffn_layer`, or `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"Unknown ffn_layer {ffn_layer!r}; available: {', '.join(FFN_LAYERS)}")
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, backend)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FFN_LAYERS[ffn_layer](dim, int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def _attention_branch(self, x: Tensor, crop_shapes: CropShapes) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), crop_shapes))

    def _ffn_branch(self, x: Tensor, crop_shapes: CropShapes) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, crop_shapes: CropShapes | None = None) -> Tensor:
        """Maps x [B, N, D] -> [B, N, D]; with `crop_shapes`, the tokens of several groups, [T, D] -> [T, D]."""
        shapes = [(x.shape[0], x.shape[1])] if crop_shapes is None else crop_shapes
        drop_rate = self.drop_path_rate if self.training else 0.0
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        tokens = add_branch(tokens, self._attention_branch, shapes, drop_rate)
        tokens = add_branch(tokens, self._ffn_branch, shapes, drop_rate)
        return tokens.view(x.shape)
