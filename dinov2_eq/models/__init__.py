"""Backbones by name: one file and one line each."""

from typing import Any

from dinov2_eq.models.backbone import Backbone, BackboneKind
from dinov2_eq.models.resnet import resnet
from dinov2_eq.models.vision_transformer import ARCHS, DinoVisionTransformer, vit
from dinov2_eq.settings import StudentConfig

__all__ = ["ARCHS", "BACKBONES", "DinoVisionTransformer", "build_backbone"]

BACKBONES: dict[str, BackboneKind] = {
    **{name: vit(arch) for name, arch in ARCHS.items()},
    "resnet18": resnet("resnet18"),
    "resnet50": resnet("resnet50"),
}


def build_backbone(arch: str, *, img_size: int, **settings: Any) -> Backbone:
    """Builds a backbone of the table `BACKBONES`.

    Args:
        img_size: side of the images in pixels.
        settings: fields of `StudentConfig`, whose defaults hold for the others; without stochastic depth by default.

    Raises:
        ValueError: unknown architecture, or a setting that it cannot have.
    """
    if arch not in BACKBONES:
        raise ValueError(f"Unknown architecture {arch!r}; available: {', '.join(BACKBONES)}")
    return BACKBONES[arch].build(StudentConfig(**{"arch": arch, "drop_path_rate": 0.0, **settings}), img_size)
