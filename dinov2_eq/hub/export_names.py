"""Converts a backbone to the tensor names and config.json of timm and of Hugging Face's transformers.

Tensors that those libraries require and this backbone may not have are filled with neutral values: 0 for biases, 1 for
LayerScale. timm has no mask token, which does not affect features.
"""

import re
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.layers.swiglu_ffn import SwiGLUFFN
from dinov2_eq.models import DinoVisionTransformer

# timm models with an MLP, by width. model_args in config.json override their sizes, so any of them works for any width.
TIMM_MODELS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}
TIMM_SWIGLU = "vit_giant_patch14_dinov2"
HUGGING_FACE_RATIOS = range(1, 17)
LAYERS_WITH_BIAS = tuple(f"{layer}.weight" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"))
HUGGING_FACE_NAMES = [
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
]


def to_timm(backbone: DinoVisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under timm's names, and the parts `architecture` and `model_args` of its config.json."""
    registers, (gated, width) = backbone.num_register_tokens, feed_forward(backbone)
    weights = backbone.state_dict()
    del weights["mask_token"]
    _fill_biases(weights)
    if gated:
        _fill_layer_scales(weights, backbone)  # because this timm model always has them
    if registers:  # because timm then only has positions for patches
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
        weights["reg_token"] = weights.pop("register_tokens")
    weights = {name.replace(".w12.", ".fc1.").replace(".w3.", ".fc2."): tensor for name, tensor in weights.items()}
    architecture = TIMM_SWIGLU if gated else f"{TIMM_MODELS.get(backbone.embed_dim, 'vit_base')}_patch16_224"
    arguments = {
        **_sizes(backbone),
        "mlp_ratio": _exact_ratio(2 * width if gated else width, backbone.embed_dim),
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
        "dynamic_img_size": True,
        "num_classes": 0,
    }
    if "blocks.0.ls1.gamma" in weights:
        arguments["init_values"] = 1.0
    return weights, {"architecture": architecture, "model_args": arguments}


def to_hugging_face(backbone: DinoVisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the names of Dinov2Model (with registers: Dinov2WithRegistersModel), and its config.json.

    Raises:
        ValueError: the width of the feed-forward layers cannot be expressed in config.json.
    """
    registers, (gated, width) = backbone.num_register_tokens, feed_forward(backbone)
    dim = backbone.embed_dim
    ratio = next((ratio for ratio in HUGGING_FACE_RATIOS if _hugging_face_width(dim, ratio, gated) == width), None)
    if ratio is None:
        raise ValueError(
            f"Hugging Face's Dinov2Model cannot express feed-forward layers {width} wide on tokens of {dim} channels, "
            "only whole multiples (two thirds of them for swiglu); export to timm, onnx or safetensors"
        )
    weights = backbone.state_dict()
    _fill_biases(weights)
    _fill_layer_scales(weights, backbone)
    for name in [name for name in weights if ".attn.qkv." in name]:
        parts = weights.pop(name).chunk(3)
        weights |= {name.replace("qkv", part): t for part, t in zip(("query", "key", "value"), parts, strict=True)}
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": backbone.n_blocks,
        "num_attention_heads": backbone.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "use_swiglu_ffn": gated,
        "qkv_bias": "blocks.0.attn.query.bias" in weights,
        "layer_norm_eps": backbone.norm.eps,
        "layerscale_value": 1.0,
        "image_size": image_size(backbone),
        "patch_size": backbone.patch_size,
        "num_channels": backbone.patch_embed.proj.in_channels,
    }
    if registers:
        config["num_register_tokens"] = registers
    return {_hugging_face_name(name): tensor for name, tensor in weights.items()}, config


def feed_forward(backbone: DinoVisionTransformer) -> tuple[bool, int]:
    """Whether the feed-forward layers are gated, and their width in channels."""
    layer = backbone.blocks[0].mlp
    gated = isinstance(layer, SwiGLUFFN)
    return gated, (layer.w3 if gated else layer.fc2).in_features


def image_size(backbone: DinoVisionTransformer) -> int:
    """Side, in pixels, of the images that need no resizing of the position embedding."""
    return backbone.patch_size * round(backbone.patch_embed.num_patches**0.5)


def _sizes(backbone: DinoVisionTransformer) -> dict[str, Any]:
    return {
        "img_size": image_size(backbone),
        "patch_size": backbone.patch_size,
        "in_chans": backbone.patch_embed.proj.in_channels,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.n_blocks,
        "num_heads": backbone.num_heads,
        "qkv_bias": backbone.blocks[0].attn.qkv.bias is not None,
    }


def _exact_ratio(width: int, dim: int) -> float:
    """A ratio with int(dim * ratio) == width despite rounding."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else (width + 0.5) / dim


def _hugging_face_width(dim: int, ratio: int, gated: bool) -> int:
    return (int(dim * ratio * 2 / 3) + 7) // 8 * 8 if gated else dim * ratio


def _hugging_face_name(name: str) -> str:
    for pattern, replacement in HUGGING_FACE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fill_biases(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if name.endswith(LAYERS_WITH_BIAS)]:
        weights.setdefault(name.replace(".weight", ".bias"), weights[name].new_zeros(len(weights[name])))


def _fill_layer_scales(weights: dict[str, Tensor], backbone: DinoVisionTransformer) -> None:
    for block in range(backbone.n_blocks):
        for branch in (1, 2):
            weights.setdefault(f"blocks.{block}.ls{branch}.gamma", torch.ones(backbone.embed_dim))
