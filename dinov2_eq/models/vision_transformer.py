"""The DINOv2 vision transformer (Oquab et al., arXiv 2304.07193; registers: Darcet et al., arXiv 2309.16588).

Constructor arguments, state-dict names and output names are DINOv2's, so weights travel both ways (unchunked names).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_eq.layers.batch_norm import SyncBatchNorm
from dinov2_eq.layers.block import Block
from dinov2_eq.layers.layer_scale import LayerScale
from dinov2_eq.layers.patch_embed import PATCH_EMBEDS
from dinov2_eq.layers.swiglu_ffn import SwiGLUFFN
from dinov2_eq.models.backbone import FLOAT_BYTES, Backbone, BackboneKind, Kept
from dinov2_eq.models.resize import resize_positions
from dinov2_eq.settings import StudentConfig

INPUT_NAMES = ("patch_embed.", "pos_embed", "cls_token", "mask_token", "register_tokens")
# What a block keeps of a token beside its feed-forward layer, in units of the embedding size: both norms' inputs and
# outputs, q, k, v, what attention gives (in each group of crops, and in all), and the inputs of both LayerScales.
KEPT_BESIDE_FFN = 11


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


class DinoVisionTransformer(Backbone):
    """Patches to tokens; images of any size made of whole patches, and crops of several sizes in one forward.

    Args:
        img_size: side, in pixels, of the images the position table fits as it is; others interpolate it.
        patch_size: side of a patch in pixels.
        mlp_ratio: width of the feed-forward layer over `embed_dim`.
        drop_path_rate: stochastic depth, in [0, 1); the share of samples that skip a branch in training.
        drop_path_uniform: the same rate in every block; otherwise linear from 0 to the rate.
        init_values: initial LayerScale; None or 0 builds none.
        ffn_layer: "mlp" or "swiglu" ("swiglufused" is the same).
        num_register_tokens: extra tokens between class token and patches, without position.
        interpolate_antialias: antialias when the position table is resized.
        interpolate_offset: in [0, 1); added to the target side when the table is resized. Weights trained without
            registers were published with 0.1, those with registers with 0.
        attention: "auto", "sdpa" or "xformers", see `layers.attention.choose_backend`.
        patch_embed: "linear" (DINOv2) or "conv", see `layers.patch_embed`.

    Raises:
        ValueError: a value outside the ranges above, or an `img_size` that is not made of whole patches.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention: str = "auto",
        patch_embed: str = "linear",
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        if not 0 <= interpolate_offset < 1:
            raise ValueError(f"interpolate_offset must be in [0, 1), got {interpolate_offset}")
        self.embed_dim = self.num_features = embed_dim
        self.num_tokens = 1  # the class token
        self.n_blocks = self.num_layers = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = PATCH_EMBEDS[patch_embed](img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        last = max(depth - 1, 1)
        drop_path_rates = [drop_path_rate * (1 if drop_path_uniform else index / last) for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path_rate=rate,
                init_values=init_values,
                ffn_layer=ffn_layer,
                backend=attention,
            )
            for rate in drop_path_rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Sets every parameter: needed after `to_empty`, and with a new seed it starts afresh."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm, LayerScale, SyncBatchNorm)):
                module.reset_parameters()

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of (rows, columns) patches, [1, 1 + rows * columns, D]."""
        return resize_positions(
            self.pos_embed, grid, antialias=self.interpolate_antialias, offset=self.interpolate_offset
        )

    def prepare_tokens_with_masks(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """images [B, C, H, W], masks [B, N] bool -> tokens [B, 1 + R + N, D]: class, registers, patches.

        A masked patch is replaced by the mask token before the position is added, so it keeps its place.
        """
        tokens = self.patch_embed(images)  # [B, N, D]
        if masks is not None:
            if masks.shape != tokens.shape[:2]:
                raise ValueError(
                    f"masks have shape {tuple(masks.shape)}, but the images {tuple(images.shape)} give [B, N] = "
                    f"{tuple(tokens.shape[:2])} patches"
                )
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(self.patch_embed.grid(*images.shape[-2:]))
        if self.register_tokens is None:
            return tokens
        cls_token, patch_tokens = tokens[:, :1], tokens[:, 1:]
        return torch.cat([cls_token, self.register_tokens.expand(tokens.shape[0], -1, -1), patch_tokens], dim=1)

    def _split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 1 + R + N, D] -> class token [B, D], registers [B, R, D], patches [B, N, D]"""
        cls_token, register_tokens, patch_tokens = tokens.tensor_split([1, 1 + self.num_register_tokens], dim=1)
        return cls_token.squeeze(1), register_tokens, patch_tokens

    def _forward_features_list(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[dict]:
        prepared = [self.prepare_tokens_with_masks(*pair) for pair in zip(crops, masks, strict=True)]
        crop_shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in prepared]
        flat = torch.cat([tokens.flatten(0, 1) for tokens in prepared])  # [T, D], T over all crops
        for block in self.blocks:
            flat = block(flat, crop_shapes)
        sizes = [batch * num_tokens for batch, num_tokens in crop_shapes]
        outputs = []
        for shape, mask, normed, prenorm in zip(
            crop_shapes, masks, self.norm(flat).split(sizes), flat.split(sizes), strict=True
        ):
            cls_token, register_tokens, patch_tokens = self._split_tokens(normed.unflatten(0, shape))
            outputs.append(
                {
                    "x_norm_clstoken": cls_token,  # [B, D]
                    "x_norm_regtokens": register_tokens,  # [B, R, D]
                    "x_norm_patchtokens": patch_tokens,  # [B, N, D]
                    "x_prenorm": prenorm.unflatten(0, shape),  # [B, 1 + R + N, D]
                    "masks": mask,
                }
            )
        return outputs

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> dict | list[dict]:
        """Tokens after the last block, normalised and not.

        Args:
            x: images [B, C, H, W], or a list of them, one entry for each crop size.
            masks: [B, N] bool, True where a patch is hidden; for a list of images a list (None: nothing hidden).

        Returns:
            for one tensor a dict, for a list a list of dicts: x_norm_clstoken [B, D], x_norm_regtokens [B, R, D],
            x_norm_patchtokens [B, N, D], x_prenorm [B, 1 + R + N, D], masks.

        Raises:
            ValueError: images that do not split into whole patches, or masks of another shape.
        """
        if isinstance(x, Tensor):
            return self._forward_features_list([x], [masks])[0]
        return self._forward_features_list(x, [None] * len(x) if masks is None else masks)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Patch tokens after some of the blocks, in the order of depth.

        Args:
            x: images [B, C, H, W].
            n: the last n blocks, or the indices of the blocks, counted from 0.
            reshape: patches as maps [B, D, H / p, W / p] in place of [B, N, D].
            return_class_token: pairs (patches, class token [B, D]) in place of patches.
            norm: pass the tokens through the final norm.

        Raises:
            ValueError: a block that does not exist.
        """
        wanted = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        if not set(wanted) <= set(range(self.n_blocks)):
            raise ValueError(f"n={n} asks for a block that does not exist: the model has {self.n_blocks} blocks")
        tokens = self.prepare_tokens_with_masks(x)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index not in wanted:
                continue
            cls_token, _, patches = self._split_tokens(self.norm(tokens) if norm else tokens)
            if reshape:
                grid = self.patch_embed.grid(*x.shape[-2:])
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()  # [B, D, rows, columns]
            outputs.append((patches, cls_token) if return_class_token else patches)
        return tuple(outputs)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Tensor | dict | list[Tensor] | list[dict]:
        """The class token(s) [B, D]; with `is_training`, all that `forward_features` gives."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, dict):
            return self.head(features["x_norm_clstoken"])
        return [self.head(crop["x_norm_clstoken"]) for crop in features]

    def stages(self) -> Sequence[nn.Module]:
        return self.blocks

    def layer_of(self, name: str) -> int:
        if name.startswith(INPUT_NAMES):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.num_layers + 1

    def is_patch_embed(self, name: str) -> bool:
        return name.startswith("patch_embed.")

    def start_from(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        from dinov2_eq.models.convert import adapt

        return adapt(weights, self)

    def kept_of_image(self, size: int, compute_bytes: int) -> list[Kept]:
        rows, columns = self.patch_embed.grid(size, size)
        tokens = 1 + self.num_register_tokens + rows * columns
        per_token = [kept_per_token(block, compute_bytes) for block in self.blocks]
        return [Kept(tokens * kept, tokens * FLOAT_BYTES * self.embed_dim) for kept in per_token]


def kept_per_token(block: Block, compute_bytes: int) -> float:
    """Returns the bytes that autograd keeps for one token in one block, which sees it only where it does not drop it.

    Counted from the operations, within 2 % of what a CPU keeps.
    """
    dim, ffn = block.norm1.normalized_shape[0], block.mlp
    # SwiGLU keeps gate and value, the gate after its activation, and the product; an MLP what is before and after GELU.
    ffn_width = 4 * ffn.w3.in_features if isinstance(ffn, SwiGLUFFN) else 2 * ffn.fc2.in_features
    values, inputs = KEPT_BESIDE_FFN * dim + ffn_width, 2 * dim  # the inputs of the norms stay in float32
    if block.drop_path_rate > 0:  # the outputs of both branches, before they are scaled up
        values, inputs = values + 2 * dim, inputs + 2 * dim
    return (1 - block.drop_path_rate) * (compute_bytes * values + (FLOAT_BYTES - compute_bytes) * inputs)


def vit(arch: Arch) -> BackboneKind:
    """Returns the transformer of a given shape; the settings of a run may change each part of it."""
    return BackboneKind(
        partial(_build, arch),
        patch_size=attrgetter("patch_size"),
        masks_patches=True,
        whole_patches=True,
        weights_of=_weights_of,
    )


def _weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    from dinov2_eq.models.convert import to_dinov2

    return to_dinov2(checkpoint)


def _build(arch: Arch, settings: StudentConfig, img_size: int) -> DinoVisionTransformer:
    return DinoVisionTransformer(
        img_size=img_size,
        patch_size=settings.patch_size,
        embed_dim=settings.embed_dim or arch.embed_dim,
        depth=settings.depth or arch.depth,
        num_heads=settings.num_heads or arch.num_heads,
        mlp_ratio=settings.mlp_ratio,
        qkv_bias=settings.qkv_bias,
        ffn_bias=settings.ffn_bias,
        proj_bias=settings.proj_bias,
        drop_path_rate=settings.drop_path_rate,
        drop_path_uniform=settings.drop_path_uniform,
        init_values=settings.layerscale,
        ffn_layer=settings.ffn_layer or arch.ffn_layer,
        num_register_tokens=settings.num_register_tokens,
        interpolate_antialias=settings.interpolate_antialias,
        interpolate_offset=settings.interpolate_offset,
        attention=settings.attention,
        patch_embed=settings.patch_embed,
    )
