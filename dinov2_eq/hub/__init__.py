"""Backbones for torch.hub; importing and loading them only needs torch and a checkout."""

from dinov2_eq.hub.backbones import ENTRY_POINTS, BackboneWithProjection, Features, entry_point_of

__all__ = ["ENTRY_POINTS", "BackboneWithProjection", "Features", "entry_point_of"]
