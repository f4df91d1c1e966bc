"""Pools tokens to one vector per view, for losses that compare whole images."""

from torch import Tensor

from dinov2_eq.types import CropTokens

POOLS = ("cls", "mean")


def pooled(tokens: CropTokens, pool: str) -> Tensor:
    """Returns the class token or the mean patch token of each view, [V, B, D]."""
    return tokens.cls if pool == "cls" else tokens.patches.mean(dim=2)
