"""Exports a backbone as an ONNX graph for any number of images of any size in whole patches.

Input: images [B, C, H, W]. Outputs: class_token [B, D] and patch_tokens [B, N, D], after the final norm.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_eq.models import DinoVisionTransformer

LARGEST_SIDE = 1024  # in patches; an upper bound for the exporter
LARGEST_FILE = 2**31  # bytes of one protobuf message; larger weights go to a separate file
CUBIC, CUBIC_ANTIALIAS = -0.75, -0.5  # torch's constants of the bicubic kernel, without and with antialiasing


def write_onnx(path: Path, backbone: DinoVisionTransformer, metadata: Mapping[str, Any]) -> None:
    """Writes the graph with its weights; the values of `metadata` are stored as JSON in the file.

    Raises:
        ImportError: the package onnxscript is missing.
        OSError: the file cannot be written.
    """
    patch = backbone.patch_size
    rows, columns = (patch * torch.export.Dim(name, min=1, max=LARGEST_SIDE) for name in ("rows", "columns"))
    program = torch.onnx.export(
        OnnxBackbone(backbone).eval(),
        # All sizes differ, so that the exporter does not take two of them for the same.
        (torch.zeros(2, backbone.patch_embed.proj.in_channels, 5 * patch, 7 * patch),),
        dynamo=True,
        input_names=["images"],
        output_names=["class_token", "patch_tokens"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch"), 2: rows, 3: columns}},
        verbose=False,
    )
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    num_bytes = sum(tensor.nbytes for tensor in backbone.state_dict().values())
    program.save(path, external_data=num_bytes > LARGEST_FILE // 2)


class OnnxBackbone(nn.Module):
    """A backbone that can be traced for all image sizes, because it resizes positions by matrix products.

    `DinoVisionTransformer` decides in Python whether to resize; tracing would fix that decision for one size.
    """

    def __init__(self, backbone: DinoVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images [B, C, H, W] -> class token [B, D], patch tokens [B, N, D]."""
        backbone = self.backbone
        positions = resized_positions(backbone, backbone.patch_embed.grid(*images.shape[-2:]))
        first = [backbone.cls_token + positions[:, :1]]
        if backbone.num_register_tokens:
            first.append(backbone.register_tokens)
        prefix = torch.cat(first, dim=1)  # [1, 1 + R, D]
        patches = backbone.patch_embed(images) + positions[:, 1:]
        tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], dim=1)
        for block in backbone.blocks:
            tokens = block(tokens)
        tokens = backbone.norm(tokens)
        return tokens[:, 0], tokens[:, prefix.shape[1] :]


def resized_positions(backbone: DinoVisionTransformer, grid: Sequence[int]) -> Tensor:
    """Resizes positions to a grid of (rows, columns) like `backbone.interpolate_pos_encoding`.

    Returns:
        [1, 1 + rows * columns, D]
    """
    side, antialias = round(backbone.patch_embed.num_patches**0.5), backbone.interpolate_antialias
    cls_position, table = backbone.pos_embed.split([1, side**2], dim=1)
    lengths = [torch.scalar_tensor(length) for length in grid]
    kept = [length == side for length in lengths]
    if not antialias:  # torch then resizes both axes or none
        kept = [kept[0] & kept[1]] * 2
    matrices = []
    for length, size, unchanged in zip(grid, lengths, kept, strict=True):
        offset = torch.where(unchanged, 0.0, backbone.interpolate_offset)
        matrices.append(resize_matrix(length, side, side / (size + offset), antialias))
    table = table.unflatten(1, (side, side))
    table = torch.einsum("cj,bijd->bicd", matrices[1], table)
    table = torch.einsum("ri,bicd->brcd", matrices[0], table)
    return torch.cat([cls_position, table.flatten(1, 2)], dim=1)


def resize_matrix(length: int, side: int, step: Tensor, antialias: bool) -> Tensor:
    """Builds the matrix [length, side] that resizes `side` values to `length` bicubically, as torch does.

    Args:
        step: distance between neighbouring new values, in units of old values; [] float.
        antialias: widen the kernel when shrinking.
    """
    centres = (torch.arange(length) + 0.5).unsqueeze(1) * step  # [length, 1]
    if antialias:
        distances = (torch.arange(side) + 0.5 - centres) / step.clamp(min=1.0)
        weights = _cubic(distances, CUBIC_ANTIALIAS)
        return weights / weights.sum(dim=1, keepdim=True)
    taps = (centres - 0.5).floor() + torch.arange(-1, 3)  # [length, 4]
    weights = _cubic(centres - 0.5 - taps, CUBIC)
    is_read = taps.clamp(0, side - 1).unsqueeze(2) == torch.arange(side)  # [length, 4, side]; border values repeat
    return (weights.unsqueeze(2) * is_read).sum(dim=1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (IEEE ASSP 1981), which is 0 beyond distance 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
