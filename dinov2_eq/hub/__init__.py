"""Backbones for torch.hub. Nothing below imports more than torch, so that a bare checkout is enough."""

from dinov2_eq.hub.backbones import ENTRY_POINTS, BackboneWithProjection, Features, entry_point_of

__all__ = ["ENTRY_POINTS", "BackboneWithProjection", "Features", "entry_point_of"]
