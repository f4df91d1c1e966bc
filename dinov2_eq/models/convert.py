"""Converts weights of other vision transformers to DINOv2's names, and fits them to another image or patch size.

Supports the names of DINOv2 (also with chunked blocks), DINO, iBOT, timm, Hugging Face (Dinov2, Dinov2WithRegisters,
ViT; before and after version 5) and this project, bare or inside a checkpoint.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.models import ARCHS, DinoVisionTransformer
from dinov2_eq.models.resize import resize_channels, resize_patch_kernel, resize_positions
from dinov2_eq.settings import StudentConfig

NOT_ARCHITECTURE = {"pretrained_weights", "drop_path_rate", "drop_path_uniform", "attention"}
HEADS = {arch.embed_dim: arch.num_heads for arch in ARCHS.values()}  # also of nearly every published model so wide
DEFAULT_MLP_RATIO = 4.0
NUM_SHOWN = 3  # names in a message
ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")  # every backbone has one
PREFERRED = ("teacher", "ema")  # if a checkpoint contains several backbones
EXTRAS = {"head", "head_dist", "fc", "classifier", "pooler", "decoder"}  # share the backbone's prefix, but are not part
# Wrappers of modules: torch.compile, activation checkpointing, FSDP, and DDP or DataParallel.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
# Hugging Face to DINOv2; only the first matching pattern is applied.
RENAMED = [
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
]
RENAMED_IN_BLOCK = [
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]
# The results of `infer_architecture` that `adapt` cannot change, with their description.
SHAPING = {
    "embed_dim": "channels",
    "depth": "blocks",
    "ffn_layer": "feed-forward layer",
    "mlp_ratio": "its ratio",
    "init_values": "LayerScale",
    "num_register_tokens": "registers",
    "qkv_bias": "biases of queries, keys and values",
    "proj_bias": "biases of attention outputs",
    "ffn_bias": "biases of feed-forward layers",
}
# Tensors that are concatenated to one tensor in DINOv2.
JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}

logger = logging.getLogger(__name__)


def to_dinov2(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Extracts the backbone of a state dict or checkpoint, under the names of `DinoVisionTransformer`.

    Where a checkpoint holds several backbones, the teacher's is taken, else the moving average ("ema"). What belongs
    to no backbone, heads for example, is left out and listed in the log. Unknown tensors inside the backbone are kept,
    so that `adapt` rejects them. Names of modules that wrap another (torch.compile, DDP, ...) are removed. No tensor is
    changed but for the class token's position, which timm adds up.

    Raises:
        ValueError: no backbone with known names, or several of which none is the teacher's.
    """
    tensors = _unwrapped(dict(_flatten(state)))
    prefix = _find_backbone(tensors)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    inside = {name: tensor for name, tensor in inside.items() if name.split(".")[0] not in EXTRAS}
    if left_out := len(tensors) - len(inside):
        kept = {prefix + name for name in inside}
        parts = sorted({_part(name) for name in tensors if name not in kept})
        logger.info("not of the backbone, left out: %d tensors (%s)", left_out, _first(parts))
    weights = _join({_rename(name): tensor for name, tensor in inside.items()})
    _name_swiglu(weights)
    _split_positions(weights)
    return weights


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the names of wrappers from tensor names, unless the result is the name of another tensor."""
    unwrapped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = WRAPPERS.sub("", name)
        unwrapped[name if bare in unwrapped else bare] = tensor
    return unwrapped


def _flatten(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")


def _find_backbone(tensors: Mapping[str, Tensor]) -> str:
    prefixes = [name.removesuffix(end) for end in ANCHORS for name in tensors if f".{name}".endswith(f".{end}")]
    if not prefixes:
        names = _first(list(tensors)) or "there are no tensors"
        raise ValueError(
            f"No vision transformer is named in these weights: {names}. Known are the names of DINOv2, DINO, iBOT and "
            "timm (patch_embed.proj.weight, blocks.0.attn.qkv.weight) and of Hugging Face "
            "(embeddings.patch_embeddings.projection.weight), bare or within a checkpoint"
        )
    for word in PREFERRED:
        if len(preferred := [prefix for prefix in prefixes if word in prefix]) == 1:
            return preferred[0]
    if len(prefixes) > 1:
        raise ValueError(
            f"These weights hold {len(prefixes)} backbones, {', '.join(prefixes)}, and none is clearly the teacher; "
            "save the one to use in its own file"
        )
    return prefixes[0]


def _part(name: str) -> str:
    """The part of the network that a tensor belongs to, for a message: its name up to a number, or its parent."""
    return re.match(r"(.*?)(?:\.\d+\..*|\.[^.]*)?$", name)[1]


def _rename(name: str) -> str:
    for pattern, replacement in RENAMED:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    for pattern, replacement in RENAMED_IN_BLOCK:
        name = re.sub(pattern, replacement, name) if name.startswith("blocks.") else name
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunked: blocks.<chunk>.<block>.
    return {"reg_token": "register_tokens", "masked_embed": "mask_token"}.get(name, name)  # timm; iBOT


def _join(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in tensors.items():
        for whole, parts in JOINED.items():
            siblings = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if f".{parts[0]}." in name and all(sibling in tensors for sibling in siblings):
                joined[name.replace(parts[0], whole)] = torch.cat([tensors[sibling] for sibling in siblings])
                break
            if any(f".{part}." in name for part in parts[1:]):
                break
        else:
            joined[name] = tensor
    return joined


def _name_swiglu(weights: dict[str, Tensor]) -> None:
    """Renames SwiGLU layers, which timm names like an MLP; the first gives twice the width that the second takes."""
    for name in [name for name in weights if name.endswith(".mlp.fc1.weight")]:
        layer = name.removesuffix("fc1.weight")
        second = weights.get(f"{layer}fc2.weight")
        if second is None or len(weights[name]) != 2 * second.shape[1]:
            continue
        for ours, theirs in (("w12", "fc1"), ("w3", "fc2")):
            for kind in ("weight", "bias"):
                if f"{layer}{theirs}.{kind}" in weights:
                    weights[f"{layer}{ours}.{kind}"] = weights.pop(f"{layer}{theirs}.{kind}")


def _split_positions(weights: dict[str, Tensor]) -> None:
    """Converts positions of timm models, which may have none for the class token, or one for each register."""
    table, registers = weights.get("pos_embed"), weights.get("register_tokens")
    if table is None or table.ndim != 3:
        return
    others = table.shape[1] - isqrt(table.shape[1]) ** 2  # positions of tokens other than patches
    if _is_square(table.shape[1]):
        side = isqrt(table.shape[1])
        logger.warning("%d positions are taken for %d x %d patches, and the class token has none", side**2, side, side)
        weights["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    elif registers is not None and others == 1 + registers.shape[1]:
        weights["register_tokens"] = registers + table[:, 1:others]
        weights["pos_embed"] = torch.cat([table[:, :1], table[:, others:]], dim=1)


def backbone_arguments(student: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `build_backbone` needs of a training config's section "student"; `img_size` comes from "crops".

    Drop path and the attention kernel are omitted, because they concern the training and its machine.
    """
    wanted = StudentConfig.__dataclass_fields__.keys() - NOT_ARCHITECTURE
    return {name: value for name, value in student.items() if name in wanted}


def _is_square(number: int) -> bool:
    return isqrt(number) ** 2 == number


def _side(table: Tensor) -> int:
    """Returns the side of the square grid of patches that a position table is for."""
    num_patches = table.shape[1] - 1
    if not _is_square(num_patches):
        raise ValueError(
            f"A position table of {table.shape[1]} entries is not for a class token and a square grid of patches; "
            "weights for images that are not square, or for other tokens besides, cannot be used"
        )
    return isqrt(num_patches)


def infer_architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infers the arguments of the `DinoVisionTransformer` that weights belong to.

    What cannot be inferred is assumed to be as in the published models: attention heads of 64 channels (this is
    logged), and position tables resized as in DINOv2: with registers to the exact size with antialiasing, otherwise
    with the offset 0.1.

    Args:
        weights: under DINOv2's names, see `to_dinov2`.

    Raises:
        ValueError: a required tensor is missing, or the number of heads is not standard for this width.
    """
    architecture = _architecture(weights)
    logger.info("%(num_heads)d attention heads are assumed, as is usual for %(embed_dim)d channels", architecture)
    return architecture


def _architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
        side = _side(weights["pos_embed"])
        gated = "blocks.0.mlp.w12.weight" in weights
        width = weights["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"Weights without {error} do not tell their architecture; they are not whole") from None
    if dim not in HEADS:
        usual = ", ".join(f"{heads} for {width}" for width, heads in HEADS.items())
        raise ValueError(
            f"Weights do not tell the number of attention heads, and tokens of {dim} channels have no usual one (usual "
            f"are {usual}). Load the model through its library, timm:NAME or hf:NAME, or give the config it was "
            "trained with"
        )
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return {
        "img_size": patch_size * side,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "num_heads": HEADS[dim],
        "mlp_ratio": _mlp_ratio(dim, width, gated),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "proj_bias": "blocks.0.attn.proj.bias" in weights,
        "ffn_bias": "blocks.0.mlp.w3.bias" in weights if gated else "blocks.0.mlp.fc2.bias" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "ffn_layer": "swiglu" if gated else "mlp",
        "num_register_tokens": registers,
        "interpolate_antialias": registers > 0,
        "interpolate_offset": 0.0 if registers else 0.1,
    }


def _mlp_ratio(dim: int, width: int, gated: bool) -> float:
    """A ratio that gives `width`; for gated layers, which use two thirds of it rounded up, many ratios do."""
    if not gated:
        return width / dim
    default = (int(int(DEFAULT_MLP_RATIO * dim) * 2 / 3) + 7) // 8 * 8
    return DEFAULT_MLP_RATIO if width == default else 1.5 * width / dim


def adapt(weights: Mapping[str, Tensor], backbone: DinoVisionTransformer) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts weights to `backbone`, which may have another image size, patch size or number of channels.

    - Positions are resized as `backbone` does it, so the results are those of the original at this image size.
    - Patch kernel and input channels are resized, see `models.resize`.
    - A missing mask token and missing registers are copied from `backbone`; missing LayerScale is set to 1, which has
      no effect.

    Args:
        weights: under DINOv2's names, see `to_dinov2`; not modified.

    Returns:
        a complete state dict for `backbone`, and a note for each thing that was changed or added.

    Raises:
        ValueError: anything else does not fit; names the tensors.
    """
    expected = backbone.state_dict()
    fitted, notes = dict(weights), []
    kernel, table = fitted.get("patch_embed.proj.weight"), fitted.get("pos_embed")
    if kernel is not None:
        _, channels, patch_size, _ = expected["patch_embed.proj.weight"].shape
        if kernel.shape[-1] != patch_size:
            notes.append(f"patches of {kernel.shape[-1]} pixels became {patch_size}")
        if kernel.shape[1] != channels:
            notes.append(f"{kernel.shape[1]} input channels became {channels}")
        fitted["patch_embed.proj.weight"] = resize_patch_kernel(resize_channels(kernel, channels), patch_size)
    if table is not None and _side(table) ** 2 != backbone.patch_embed.num_patches:
        side = isqrt(backbone.patch_embed.num_patches)
        antialias, offset = backbone.interpolate_antialias, backbone.interpolate_offset
        fitted["pos_embed"] = resize_positions(table, (side, side), antialias=antialias, offset=offset)
        notes.append(f"{table.shape[1] - 1} positions became {side} x {side}")
    scales = {name for name in expected if name.endswith((".ls1.gamma", ".ls2.gamma"))}
    if scales and not any(name.endswith(".gamma") for name in fitted):
        fitted |= {name: torch.ones_like(expected[name]) for name in scales}
        notes.append(f"{len(scales)} LayerScales of 1")
    for name in ("mask_token", "register_tokens"):
        if name in expected and name not in fitted:
            fitted[name] = expected[name].clone()
            notes.append(f"fresh {name.replace('_', ' ')}")
    if misfit := describe_misfit(expected, fitted):
        raise ValueError(f"The weights belong to another architecture: {_describe_shapes(weights, expected)}{misfit}")
    return fitted, notes


def _describe_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describes how two architectures differ, for a message; "" if they cannot be inferred."""
    try:
        theirs, ours = _architecture(weights), _architecture(expected)
    except ValueError:
        return ""
    for architecture in (theirs, ours):
        architecture["init_values"] = architecture["init_values"] is not None
    different = {name: words for name, words in SHAPING.items() if theirs[name] != ours[name]}
    return "".join(f"{words} {theirs[name]} there, {ours[name]} here; " for name, words in different.items())


def describe_misfit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Describes names and shapes that differ ("loaded 3 of 5 tensors; ..."); "" if all agree."""
    shared = expected.keys() & weights.keys()
    misshaped = {name for name in shared if weights[name].shape != expected[name].shape}
    problems = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": misshaped,
    }
    if not any(problems.values()):
        return ""
    listed = "; ".join(f"{len(names)} {what} ({_first(sorted(names))})" for what, names in problems.items() if names)
    return f"loaded {len(shared) - len(misshaped)} of {len(expected)} tensors; {listed}"


def _first(names: Collection[str]) -> str:
    return ", ".join(list(names)[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
